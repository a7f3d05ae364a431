"""Log-probabilities in the shapes that OpenAI and vLLM have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from serving.engine_client import TokenizerClient
from serving.responses import ChatLogprobs, CompletionLogprobs, TokenLogprobInfo, TopLogprob

# JSON has no infinity; OpenAI and vLLM write this for a token that cannot be.
MIN_LOGPROB = -9999.0

PromptLogprobMaps = list[dict[str, dict[str, Any]] | None]


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


class TokenNames:
    """How tokens are written in an answer.

    Args:
        as_ids: all of them as ``token_id:5`` (vLLM's ``return_tokens_as_token_ids``).
    """

    def __init__(self, tokenizer: TokenizerClient, *, as_ids: bool) -> None:
        self.tokenizer, self._as_ids = tokenizer, as_ids

    def name(self, token_id: int) -> str:
        """Its text inside a text; one that is part of a character shows as U+FFFD."""
        return self.id_form(token_id) if self._as_ids else self.tokenizer.token_text(token_id)

    def text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """The token's own, also where it is only part of a character."""
        return list(self.tokenizer.token_bytes(token_id))

    @staticmethod
    def id_form(token_id: int) -> str:
        return f"token_id:{token_id}"


def chat_logprobs(names: TokenNames, entries: Iterable[TokenLogprob], top: int) -> ChatLogprobs:
    def info(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(token_id), "logprob": finite(logprob), "bytes": names.bytes(token_id)}

    content = [
        TokenLogprobInfo(
            **info(entry.token_id, entry.logprob), top_logprobs=[TopLogprob(**info(*pair)) for pair in entry.top[:top]]
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content)


def prompt_logprob_maps(names: TokenNames, logprobs: PromptLogprobs, top: int) -> PromptLogprobMaps:
    """vLLM's ``prompt_logprobs``: null for the first token, then maps from ids, the token's own first.

    Ranks count from 1; an alternative's is its place among them.
    """

    def entry_of(entry: TokenLogprob) -> dict[str, dict[str, Any]]:
        alternatives = {token: (logprob, place) for place, (token, logprob) in enumerate(entry.top[:top], start=1)}
        found = {entry.token_id: (entry.logprob, entry.rank), **alternatives}
        return {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": names.text(token)}
            for token, (logprob, rank) in found.items()
        }

    return [None, *map(entry_of, logprobs)]


class CompletionLogprobWriter:
    """Collects one choice's tokens; text offsets go on from one chunk to the next.

    An offset is the place in the choice's text, in characters: a token that is left out of the text takes no place
    there, and each token of a character is where the character begins.
    """

    def __init__(self, names: TokenNames, top: int, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._names = names
        self._top = top
        self._prompt_ids = prompt_ids
        self._skip = skip_special_tokens
        self._stream = names.tokenizer.stream(skip_special_tokens, prompt_ids)
        self._offset = 0
        self._out = self._empty()

    def start_at(self, offset: int) -> None:
        """The choice's text begins with this many characters of the prompt."""
        self._offset = offset

    def add_prompt(self, logprobs: PromptLogprobs, given_text: str | None) -> None:
        """An echoed prompt: nothing comes before its first token, so that has no log-probability.

        Args:
            given_text: what the prompt's tokens were made of; None: they were given themselves.
        """
        offsets = self._prompt_offsets(given_text)
        self._append(self._prompt_ids[0], next(offsets), None, None)
        for entry, offset in zip(logprobs, offsets, strict=True):
            self._append(entry.token_id, offset, entry.logprob, self._alternatives(entry))

    def _prompt_offsets(self, given_text: str | None) -> Iterator[int]:
        stream = self._names.tokenizer.stream(self._skip or given_text is not None)
        offset = 0
        for token_id in self._prompt_ids:
            yield offset
            text = stream.push(token_id)
            if given_text is None:
                offset += len(text)
            else:
                # A special token is in a text where the client wrote it, and not where the tokenizer added it; after
                # one, tokenizers with a prefix space have a space that the text has not.
                forms = (text, text.removeprefix(" ")) if text else (self._names.text(token_id),)
                offset += next((len(form) for form in forms if given_text.startswith(form, offset)), len(text))

    def add(self, entries: Iterable[TokenLogprob]) -> None:
        for entry in entries:
            self._append(entry.token_id, self._offset, entry.logprob, self._alternatives(entry))
            self._offset += len(self._stream.push(entry.token_id))

    def take(self) -> CompletionLogprobs:
        """What was added since the last call."""
        taken, self._out = self._out, self._empty()
        return taken

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """Most likely first, and always the token itself, under its text; others of the same text go by their ids."""
        own = self._names.name(entry.token_id)
        found: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._top]:
            name = self._names.name(token_id)
            if token_id != entry.token_id and (name == own or name in found):
                name = self._names.id_form(token_id)
            found[name] = finite(logprob)
        found.setdefault(own, finite(entry.logprob))
        return found

    def _append(self, token_id: int, offset: int, logprob: float | None, top: dict[str, float] | None) -> None:
        self._out.tokens.append(self._names.name(token_id))
        self._out.token_logprobs.append(None if logprob is None else finite(logprob))
        self._out.top_logprobs.append(top)
        self._out.text_offset.append(offset)

    @staticmethod
    def _empty() -> CompletionLogprobs:
        return CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
