"""Finds the strings that end an answer. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Mapping

# Text never holds a lone surrogate, so each can stand for a token that the text leaves out.
_FIRST_MARK = 0xD800


class _Begun:
    """How much of one stop string a text ends with (Knuth, Morris and Pratt): the time grows with the text alone."""

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        # Of each beginning of the stop string that has been reached: the longest shorter one that it ends with.
        self._borders = [0]

    def push(self, text: str, counts: bool) -> int | None:
        """Where in this text the first complete stop string begins, below 0 before it; None: there is none.

        Args:
            counts: whether one that is complete in this text is found; else its end may still begin another.
        """
        stop, length, borders = self.stop, self.length, self._borders
        if not length and stop[0] not in text:
            return None
        for end, character in enumerate(text, 1):
            length = self._extend(length, character)
            if length > len(borders):
                borders.append(self._extend(borders[-1], character))
            if length == len(stop):
                if counts:
                    return end - length
                length = borders[-1]
        self.length = length
        return None

    def _extend(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._borders[length - 1]
        return length + (self.stop[length] == character)


class StopMatcher:
    """Finds stop strings across token borders; text that may still become one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._begun = tuple(map(_Begun, stops))
        self._held = ""

    def push(self, text: str, counts: bool = True) -> tuple[str, str | None]:
        """Text that is certain, and the stop string if one is complete (nothing from it on is emitted).

        Args:
            counts: False: one that is complete in this text ends nothing, as before ``min_tokens``; one that only
                begins in it may end what follows.
        """
        if not self._begun:
            return text, None
        found = [(start, each.stop) for each in self._begun if (start := each.push(text, counts)) is not None]
        known = self._held + text
        if found:
            start, stop = min(found, key=lambda match: match[0])
            certain = known[: len(self._held) + start]
            self._forget()
            return certain, stop
        keep = max(each.length for each in self._begun)
        certain, self._held = known[: len(known) - keep], known[len(known) - keep :]
        return certain, None

    def flush(self) -> str:
        text = self._held
        self._forget()
        return text

    def _forget(self) -> None:
        self._held = ""
        for each in self._begun:
            each.length = 0


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

    def push(self, token_id: int, text: str, counts: bool = True) -> tuple[str, str | None]:
        """As :meth:`StopMatcher.push`, with the token that gave the text."""
        certain, marked = self._marked.push(text + self._marks.get(token_id, ""), counts)
        visible, stop = self._plain.push(certain.translate(self._unmarked), counts)
        if stop is not None or marked is None:
            return visible, stop
        return visible + self._plain.flush(), self._stop_of[marked]

    def flush(self, text: str, counts: bool = True) -> tuple[str, str | None]:
        """The rest, with the last text, and the stop string if that completes one."""
        certain, marked = self._marked.push(text, counts)
        if marked is None:
            certain += self._marked.flush()
        visible, stop = self._plain.push(certain.translate(self._unmarked), counts)
        if stop is not None:
            return visible, stop
        return visible + self._plain.flush(), None if marked is None else self._stop_of[marked]
