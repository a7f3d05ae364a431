"""What bodies say, turned into what the engine or the client is given: checked, rendered, tokenized.

No event loop and no engine: all of it can run in another process, so arguments and results can be pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.errors import ContextLengthError, InvalidRequestError
from serving.engine_client import TokenizerClient
from serving.fields import Prompt, flaw_of
from serving.protocol import (
    Body,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

# A longer text that is certainly too long for the model is refused without counting its tokens.
COUNTED_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids to run, and the text when the request gave text."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """
    Attributes:
        max_model_len: most tokens of prompt and output together.
    """

    tokenizer: TokenizerClient
    max_model_len: int
    vocab_size: int

    def read(self, body: Body) -> Any:
        """By the method for such a body."""
        match body:
            case CompletionRequest():
                return self.completion(body)
            case ChatCompletionRequest():
                return self.chat(body)
            case TokenizeRequest():
                return self.tokenize(body)
            case DetokenizeRequest():
                return self.detokenize(body)
        raise TypeError(f"there is no way to read a {type(body).__name__}")

    def completion(self, body: CompletionRequest) -> list[EncodedPrompt]:
        """One encoded prompt per given one, in order.

        Raises:
            InvalidRequestError: a token id is out of range, or a prompt has no tokens.
            ContextLengthError: a prompt is so long that counting its tokens is not worth it.
        """
        encoded = [self._encode(prompt, body.add_special_tokens is not False) for prompt in body.prompts]
        # An empty text may have a token, where the tokenizer begins it with BOS.
        if not all(prompt.token_ids for prompt in encoded):
            raise InvalidRequestError("prompt must not be empty: it has no tokens", param="prompt")
        return encoded

    def chat(self, body: ChatCompletionRequest) -> list[EncodedPrompt]:
        """The one prompt that the model's template makes of the messages.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
            ContextLengthError: as of :meth:`completion`.
        """
        text = self._render(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        self._refuse_oversized(text, "messages")
        token_ids = self._tokens(text, "messages", add_special_tokens=False)
        if not token_ids:
            raise InvalidRequestError("messages must not be empty: they have no tokens", param="messages")
        return [EncodedPrompt(token_ids, text)]

    def tokenize(self, body: TokenizeRequest) -> bytes:
        """The answer as JSON, since a text may have a million tokens.

        Raises:
            InvalidRequestError: as of :meth:`chat`.
        """
        if body.messages:
            text = self._render(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
            tokens = self._tokens(text, "messages", add_special_tokens=False)
        else:
            special = body.add_special_tokens is not False
            tokens = self._tokens(body.prompt or "", "prompt", add_special_tokens=special)
        return _json({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": list(tokens)})

    def detokenize(self, body: DetokenizeRequest) -> bytes:
        """The answer as JSON.

        Raises:
            InvalidRequestError: a token id is out of range.
        """
        check_token_ids(body.tokens, self.vocab_size, "tokens")
        return _json({"prompt": self.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _encode(self, prompt: Prompt, add_special_tokens: bool) -> EncodedPrompt:
        if isinstance(prompt, str):
            self._refuse_oversized(prompt, "prompt")
            return EncodedPrompt(self._tokens(prompt, "prompt", add_special_tokens=add_special_tokens), prompt)
        if len(prompt) >= self.max_model_len:
            raise ContextLengthError.of_prompt(self.max_model_len, str(len(prompt)), param="prompt")
        check_token_ids(prompt, self.vocab_size, "prompt")
        return EncodedPrompt(prompt)

    def _tokens(self, text: str, param: str, *, add_special_tokens: bool) -> Sequence[int]:
        if (flaw := flaw_of(text, param)) is not None:
            raise InvalidRequestError(flaw, param=param)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _refuse_oversized(self, text: str, param: str) -> None:
        if len(text) > COUNTED_CHARS and (tokens := self.tokenizer.fewest_tokens(len(text))) >= self.max_model_len:
            raise ContextLengthError.of_prompt(self.max_model_len, f"at least {tokens}", param=param)

    def _render(self, messages: Sequence[ChatMessage], add: bool | None, variables: dict[str, Any]) -> str:
        if not self.tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")
        turns = [message.for_template() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, add_generation_prompt=add is not False, **variables)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param=error.param or "messages") from error


@dataclass(frozen=True, slots=True)
class Reading:
    """
    Attributes:
        body: without its content, which nobody needs any more.
        result: what :meth:`Reader.read` made of it.
    """

    body: Body
    result: Any


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Ids from outside index arrays on the device, so each is checked here.

    Raises:
        InvalidRequestError: one is out of range.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    position = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    message = f"{param}: token id {token_ids[position]} at position {position} is not in [0, {vocab_size})"
    raise InvalidRequestError(message, param=param)


def _json(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
