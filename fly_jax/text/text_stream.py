"""Tokens one by one to text that goes on from a prompt."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer as HFTokenizer

from fly_jax.text.token_bytes import TokenBytes

_REPLACEMENT = "\ufffd"
# Tokens that may wait for the rest of a character: far more than the four that one can have, since bytes before it
# that are no UTF-8 wait with it.
_MAX_PENDING = 32
# A character that lacks its last byte is decoded to at most this many replacement characters.
_MAX_INCOMPLETE = 3
# Tokens that are sure to hold what was decoded to those, and the start of the character before.
_KEPT = 16
_MAX_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """What a prompt's text ends with, as far as it decides how the text goes on.

    Attributes:
        token_ids: the last token, or all that hold bytes of its first character; empty where there is no text before.
        is_complete: the prompt ends with a whole character.
    """

    token_ids: tuple[int, ...] = ()
    is_complete: bool = True

    @classmethod
    def of(cls, backwards: Iterable[int], token_bytes: TokenBytes) -> PromptEnd:
        """
        Args:
            backwards: the prompt's tokens that have a text, last one first; only a few are taken.
        """
        token_ids: list[int] = []
        for token_id in backwards:
            token_ids.insert(0, token_id)
            if len(token_ids) == _MAX_CHARACTER_BYTES or not _continues(token_bytes.of(token_id)):
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(token_bytes.of, token_ids)))
        return cls(tuple(token_ids), is_complete=not decoder.getstate()[0])


def _continues(data: bytes) -> bool:
    """They begin inside a character."""
    return data[:1] != b"" and 0x80 <= data[0] < 0xC0


class TextStream:
    """Tokens one by one to text, never half a UTF-8 character.

    The text is what the tokens add to that of the prompt, so that a first word keeps its space. A character that the
    prompt leaves unfinished is the stream's, whatever becomes of it.

    Each new text is the difference between two decodes of the latest tokens, since what a token adds depends on
    those before it. ``tokenizers.DecodeStream`` does the same but raises where a token changes text that is already
    out, which byte-fallback vocabularies do when bytes turn out not to be UTF-8.

    Args:
        skipped: tokens that are not written out.
    """

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int], prompt: PromptEnd | None = None) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        prompt = prompt or PromptEnd()
        self._tokens = list(prompt.token_ids)
        text = self._decode() if self._tokens else ""
        # Tokens whose text is out, kept for what they do to those that follow, and the characters of it.
        self._num_read = len(self._tokens) if prompt.is_complete else 0
        self._read_length = len(text if prompt.is_complete else text.rstrip(_REPLACEMENT))

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._tokens.append(token_id)
        text = self._decode()
        if len(text) > self._read_length and not text.endswith(_REPLACEMENT):
            return self._take(text)
        return self._take_certain(text) if len(self._tokens) - self._num_read > _MAX_PENDING else ""

    def flush(self) -> str:
        """What the last tokens give although they end inside a character (replacement characters)."""
        text = self._decode()
        return self._take(text) if len(text) > self._read_length else ""

    def _take(self, text: str) -> str:
        new = text[self._read_length :]
        del self._tokens[: self._num_read]
        self._num_read, self._read_length = len(self._tokens), len(self._decode())
        return new

    def _take_certain(self, text: str) -> str:
        """All but the end that may still become a character, so that bytes that are no UTF-8 do not pile up."""
        waiting = min(_MAX_INCOMPLETE, max(0, len(text) - self._read_length))
        new = text[self._read_length : len(text) - waiting]
        del self._tokens[:-_KEPT]
        self._num_read, self._read_length = 0, max(0, len(self._decode()) - waiting)
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=False))
