"""The model folder's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from fly_jax.errors import CheckpointError, InvalidRequestError
from fly_jax.models.config import read_json

MAX_TEMPLATE_OUTPUT = 4 * 1024 * 1024
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Text to token ids and back, and messages to a prompt.

    Raises:
        CheckpointError: the folder has no usable ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: fly-jax needs the fast tokenizer's file; fetch it with the model"
            )
        try:
            self._tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CheckpointError(f"{path} cannot be read ({error}): fetch the file again") from error
        config_path = folder / "tokenizer_config.json"
        self._config = read_json(config_path) if config_path.exists() else {}
        self._template = _ChatTemplate.load(folder, self._config)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def stream(self, skip_special_tokens: bool) -> TextStream:
        return TextStream(self._tokenizer, skip_special_tokens)

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


class TextStream:
    """Tokens one by one to text, never half a UTF-8 character.

    Each new text is the difference between two decodes of the latest tokens, since what a token adds depends on
    those before it. ``tokenizers.DecodeStream`` does the same but raises where a token changes text that is already
    out, which byte-fallback vocabularies do when bytes turn out not to be UTF-8.
    """

    def __init__(self, tokenizer: HFTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens: list[int] = []
        self._num_read = 0
        self._read_text = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token_id)
        text = self._decode()
        if len(text) <= len(self._read_text) or text.endswith(_REPLACEMENT):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What the last tokens give although they end inside a character (replacement characters)."""
        text = self._decode()
        return self._take(text) if len(text) > len(self._read_text) else ""

    def _take(self, text: str) -> str:
        new = text[len(self._read_text) :]
        del self._tokens[: self._num_read]
        self._num_read, self._read_text = len(self._tokens), self._decode()
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip))


class _ChatTemplate:
    """A compiled Jinja template in a sandbox: no attribute access to internals, no mutation, bounded output."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        extensions: list[type[Extension]] = [loopcontrols]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            self._compiled = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the model's chat template is not valid Jinja: {error}") from error
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> _ChatTemplate | None:
        """From ``chat_template.jinja`` or ``tokenizer_config.json``, None where neither has one."""
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is None:
            return None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return cls(str(source), {name: _token_text(config.get(name)) for name in names})

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        pieces, size = [], 0
        try:
            for piece in self._compiled.generate(messages=list(messages), **self._special_tokens, **variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_TEMPLATE_OUTPUT:
                    raise InvalidRequestError(
                        f"the chat template wrote more than {MAX_TEMPLATE_OUTPUT} characters: shorten the messages",
                        param="messages",
                    )
        except InvalidRequestError:
            raise
        except Exception as error:  # what a template can run into has no bound: division by zero, endless recursion
            raise InvalidRequestError(f"the chat template refused the messages: {error}", param="messages") from error
        return "".join(pieces)


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers, so that templates may pass the same arguments; unlike Jinja's own, it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
