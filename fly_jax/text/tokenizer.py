"""The model folder's own tokenizer and chat template."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from fly_jax.errors import CheckpointError, InvalidRequestError
from fly_jax.host.json_files import read_json
from fly_jax.text.chat_template import ChatTemplate
from fly_jax.text.longest_token import longest_token
from fly_jax.text.special_tokens import special_tokens_of
from fly_jax.text.text_stream import PromptEnd, TextStream
from fly_jax.text.token_bytes import TokenBytes

logger = logging.getLogger(__name__)

_FILE = "tokenizer.json"
# Encoding this much holds the interpreter's lock for under a millisecond; giving it up means to wait for it again.
_SHORT_CHARS = 2048


class Tokenizer:
    """Text to token ids and back, and messages to a prompt."""

    def __init__(
        self,
        tokenizer: HFTokenizer,
        template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            special_tokens: texts by name, as of :func:`fly_jax.text.special_tokens.special_tokens_of`.
        """
        self._tokenizer, self._template = tokenizer, template
        eos = (special_tokens or {}).get("eos_token")
        self.eos_token_id: int | None = None if eos is None else tokenizer.token_to_id(eos)
        # The file may keep the settings of a training run, which would cut prompts or fill them up unasked.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(self._special)
        # The longest first, as an expression takes the first that fits; one that nothing fits where there are none.
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._token_bytes = TokenBytes(tokenizer)
        self._token_texts: dict[int, str] = {}

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder has a tokenizer's file, usable or not."""
        return (folder / _FILE).exists()

    @classmethod
    def of_folder(cls, folder: Path) -> Tokenizer:
        """
        What is put around a prompt (BOS, EOS) is what the post-processor in ``tokenizer.json`` says, and nothing where
        it has none: ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` do not count, as in
        transformers 5. (Version 4.57 made a post-processor from them for Llama's classes, with BOS by default.)

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
        special_tokens = special_tokens_of(folder, lambda text: tokenizer.token_to_id(text) is not None)
        made = cls(tokenizer, ChatTemplate.load(folder, special_tokens), special_tokens)
        _warn_of_flags(made, folder, special_tokens)
        return made

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) <= _SHORT_CHARS:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        # Of the library's ways only those for batches let other threads run meanwhile.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def fewest_tokens(self, characters: int) -> int:
        """No text of so many characters has fewer tokens; 0 where that cannot be known."""
        return 0 if self._longest_token is None else -(-characters // self._longest_token)

    @cached_property
    def _longest_token(self) -> int | None:
        return longest_token(self._tokenizer)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """What a token adds in the middle of a text, as decoders strip the space of a first word.

        Special tokens are written out; a part of a character is U+FFFD, an id without a token nothing.
        """
        if token_id not in self._token_texts:
            once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
            self._token_texts[token_id] = twice[len(once) :] if twice.startswith(once) else once
        return self._token_texts[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of :meth:`token_text`, or those of the part of a character that a token is."""
        text = self.token_text(token_id)
        return self._token_bytes.of(token_id) if "\ufffd" in text else text.encode("utf-8")

    def decode_prompt(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text before that of a :meth:`stream` with this prompt: all but a character that it leaves unfinished."""
        end = self._prompt_end(token_ids, skip_special_tokens)
        if end.is_complete:
            return self.decode(token_ids, skip_special_tokens)
        hidden = self._hidden(skip_special_tokens)
        written = [token_id for token_id in token_ids if token_id not in hidden and self._is_token(token_id)]
        before = self.decode(written[: -len(end.token_ids)], skip_special_tokens)
        return before + self.decode(end.token_ids, skip_special_tokens).rstrip("\ufffd")

    def special_in(self, texts: Sequence[str]) -> dict[int, str]:
        """The special tokens, by id, that are written out in any of the texts."""
        found = {token for text in texts for token in self._special_pattern.findall(text)}
        return {token_id: token for token_id, token in self._special.items() if token in found} if found else {}

    def stream(self, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> TextStream:
        """The text of tokens that follow a prompt; only the prompt's last few tokens are looked at."""
        end = self._prompt_end(prompt_ids, skip_special_tokens)
        return TextStream(self._tokenizer, self._hidden(skip_special_tokens), end)

    def _prompt_end(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> PromptEnd:
        hidden = self._hidden(skip_special_tokens)
        backwards = (token_id for token_id in reversed(prompt_ids) if token_id not in hidden)
        return PromptEnd.of(filter(self._is_token, backwards), self._token_bytes)

    def _hidden(self, skip_special_tokens: bool) -> frozenset[int]:
        return self._special_ids if skip_special_tokens else frozenset()

    def _is_token(self, token_id: int) -> bool:
        """Not past the end of the vocabulary, where padded ids are."""
        return self._tokenizer.id_to_token(token_id) is not None

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


def _warn_of_flags(tokenizer: Tokenizer, folder: Path, special_tokens: Mapping[str, str]) -> None:
    """Says where older versions of transformers would add a token, or leave one out, by a flag that does not count."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    added = tokenizer.decode(tokenizer.encode(""), skip_special_tokens=False)
    for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        token = special_tokens.get(name)
        if token and type(config.get(flag)) is bool and config[flag] != (token in added):
            does = "adds" if token in added else "does not add"
            logger.warning("%s has %s=%s, but %s %s %s: that counts", path, flag, config[flag], _FILE, does, token)


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
