"""The model folder's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from fly_jax.chat_template import ChatTemplate
from fly_jax.errors import CheckpointError, InvalidRequestError

_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"
# Tokens that may wait for the rest of a character: far more than the four that one can have, since bytes before it
# that are no UTF-8 wait with it.
_MAX_PENDING = 32
# A character that lacks its last byte is decoded to at most this many replacement characters.
_MAX_INCOMPLETE = 3
# Tokens that are sure to hold what was decoded to those, and the start of the character before.
_KEPT = 16


class Tokenizer:
    """Text to token ids and back, and messages to a prompt."""

    def __init__(self, tokenizer: HFTokenizer, template: ChatTemplate | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        # The file may keep the settings of a training run, which would cut prompts or fill them up unasked.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder has a tokenizer's file, usable or not."""
        return (folder / _FILE).exists()

    @classmethod
    def of_folder(cls, folder: Path) -> Tokenizer:
        """
        Raises:
            CheckpointError: the folder has no usable ``tokenizer.json``.
        """
        path = folder / _FILE
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: fly-jax needs the fast tokenizer's file; fetch it with the model"
            )
        try:
            tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CheckpointError(f"{path} cannot be read ({error}): fetch the file again") from error
        return cls(tokenizer, ChatTemplate.load(folder))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def stream(self, skip_special_tokens: bool) -> TextStream:
        return TextStream(self._tokenizer, self._special_ids if skip_special_tokens else frozenset())

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation, special tokens written out: encode it with ``add_special_tokens=False``.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """For weights that mean nothing: a byte of UTF-8 is a token, and each further id a word of its own, `` t300``.

    Raises:
        CheckpointError: the vocabulary is smaller than the bytes.
    """
    alphabet = sorted(ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise CheckpointError(
            f"vocab_size {vocab_size} is less than the {len(alphabet)} bytes that stand for text where there is no "
            f"{_FILE}: put one into the folder"
        )
    words = {character: index for index, character in enumerate(alphabet)}
    words |= {f"\u0120t{index}": index for index in range(len(alphabet), vocab_size)}  # \u0120 is a byte-level space
    tokenizer = HFTokenizer(BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return Tokenizer(tokenizer)


class TextStream:
    """Tokens one by one to text, never half a UTF-8 character.

    Each new text is the difference between two decodes of the latest tokens, since what a token adds depends on
    those before it. ``tokenizers.DecodeStream`` does the same but raises where a token changes text that is already
    out, which byte-fallback vocabularies do when bytes turn out not to be UTF-8.

    Args:
        skipped: tokens that are not written out.
    """

    def __init__(self, tokenizer: HFTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._tokens: list[int] = []
        self._num_read = 0  # tokens whose text is out, kept for what they do to those that follow
        self._read_length = 0  # characters of the tokens' text that are out

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
