"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fly_jax.outputs import TokenLogprob
from serving.engine_client import TokenizerClient
from serving.responses import ChatLogprobs, CompletionLogprobs, TokenLogprobInfo, TopLogprob

# JSON has no infinity; OpenAI and vLLM write this for a token that cannot be.
MIN_LOGPROB = -9999.0


def finite(logprob: float) -> float:
    """NaN becomes the least value too: comparing with it is false."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def token_text(tokenizer: TokenizerClient, token_id: int) -> str:
    """A token alone; one that is part of a character shows as U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def chat_logprobs(tokenizer: TokenizerClient, entries: Iterable[TokenLogprob], top: int) -> ChatLogprobs:
    def info(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8"))}

    content = [
        TokenLogprobInfo(
            **info(entry.token_id, entry.logprob), top_logprobs=[TopLogprob(**info(*pair)) for pair in entry.top[:top]]
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content)


class CompletionLogprobWriter:
    """Collects one choice's tokens; text offsets go on from one chunk to the next.

    An offset is the place in the choice's text, in characters: a token that is left out of the text takes no place
    there, and each token of a character is where the character begins.
    """

    def __init__(
        self, tokenizer: TokenizerClient, top: int, prompt_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._prompt_ids = prompt_ids
        self._skip = skip_special_tokens
        self._stream = tokenizer.stream(skip_special_tokens, prompt_ids)
        self._offset = 0
        self._out = self._empty()

    def start_at(self, offset: int) -> None:
        """The choice's text begins with this many characters of the prompt."""
        self._offset = offset

    def add_prompt(self, logprobs: Sequence[float]) -> None:
        """An echoed prompt: nothing comes before its first token, so that has no log-probability.

        The engine reports the token's own log-probability only, so that is all ``top_logprobs`` holds.
        """
        stream, offset = self._tokenizer.stream(self._skip), 0
        for token_id, logprob in zip(self._prompt_ids, [None, *logprobs], strict=True):
            text = token_text(self._tokenizer, token_id)
            self._append(text, offset, logprob, None if logprob is None else {text: finite(logprob)})
            offset += len(stream.push(token_id))

    def add(self, entries: Iterable[TokenLogprob]) -> None:
        for entry in entries:
            text = token_text(self._tokenizer, entry.token_id)
            self._append(text, self._offset, entry.logprob, self._alternatives(entry, text))
            self._offset += len(self._stream.push(entry.token_id))

    def take(self) -> CompletionLogprobs:
        """What was added since the last call."""
        taken, self._out = self._out, self._empty()
        return taken

    def _alternatives(self, entry: TokenLogprob, text: str) -> dict[str, float]:
        """Most likely first, and always the token itself; of two tokens that look alike the likelier one stays."""
        found: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._top]:
            found.setdefault(token_text(self._tokenizer, token_id), finite(logprob))
        found.setdefault(text, finite(entry.logprob))
        return found

    def _append(self, text: str, offset: int, logprob: float | None, top: dict[str, float] | None) -> None:
        self._out.tokens.append(text)
        self._out.token_logprobs.append(None if logprob is None else finite(logprob))
        self._out.top_logprobs.append(top)
        self._out.text_offset.append(offset)

    @staticmethod
    def _empty() -> CompletionLogprobs:
        return CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
