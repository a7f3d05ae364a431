"""Finds the strings that end an answer. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Mapping

# Text never holds a lone surrogate, so each can stand for a token that the text leaves out.
_FIRST_MARK = 0xD800


class StopMatcher:
    """Finds stop strings across token borders; text that may still become one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certain, and the stop string if one is complete (nothing from it on is emitted)."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(index, stop) for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            index, stop = min(found, key=lambda match: match[0])
            certain, self._held = self._held[:index], ""
            return certain, stop
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain, None

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


class StopFinder:
    """Stop strings in an answer's text, and those with special tokens also where the text leaves such tokens out.

    Args:
        hidden: texts of the tokens that are left out, by id, as far as a stop string has them.
    """

    def __init__(self, stops: tuple[str, ...], hidden: Mapping[int, str]) -> None:
        longest_first = sorted(hidden, key=lambda token_id: -len(hidden[token_id]))
        self._marks = {token_id: chr(_FIRST_MARK + n) for n, token_id in enumerate(longest_first)}
        self._unmarked = dict.fromkeys(map(ord, self._marks.values()))
        self._stop_of = {}
        for stop in stops:
            marked = stop
            for token_id, mark in self._marks.items():
                marked = marked.replace(hidden[token_id], mark)
            if marked != stop:
                self._stop_of[marked] = stop
        self._marked, self._plain = StopMatcher(tuple(self._stop_of)), StopMatcher(stops)

    def push(self, token_id: int, text: str) -> tuple[str, str | None]:
        """As :meth:`StopMatcher.push`, with the token that gave the text."""
        certain, marked = self._marked.push(text + self._marks.get(token_id, ""))
        visible, stop = self._plain.push(certain.translate(self._unmarked))
        if stop is not None or marked is None:
            return visible, stop
        return visible + self._plain.flush(), self._stop_of[marked]

    def flush(self, text: str) -> str:
        """The rest, with the last text, up to a stop string."""
        certain, marked = self._marked.push(text)
        if marked is None:
            certain += self._marked.flush()
        visible, stop = self._plain.push(certain.translate(self._unmarked))
        return visible if stop is not None else visible + self._plain.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
