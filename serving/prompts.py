"""From what a request says to token ids that the engine may be given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fly_jax.errors import InvalidRequestError
from serving.engine_client import EngineClient, TokenizerClient
from serving.fields import Prompt
from serving.protocol import ChatMessage

T = TypeVar("T")
# Tokenizers release the GIL, so a long text is encoded in a thread while streams go on; for a short one the hop costs
# more than the work.
INLINE_CHARS = 4096


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids to run, and the text when the request gave text."""

    token_ids: Sequence[int]
    text: str | None = None


async def encode_prompts(
    engine: EngineClient, prompts: Sequence[Prompt], *, add_special_tokens: bool
) -> list[EncodedPrompt]:
    """One encoded prompt per given one, in order.

    Raises:
        InvalidRequestError: a token id is out of range.
    """
    tokenizer = engine.tokenizer

    def encode_all() -> list[EncodedPrompt]:
        return [_encode(tokenizer, prompt, add_special_tokens) for prompt in prompts]

    encoded = await _off_loop(encode_all, sum(map(len, prompts)))
    for prompt in encoded:
        check_token_ids(prompt.token_ids, engine.vocab_size, "prompt")
    return encoded


def require_tokens(prompts: Sequence[EncodedPrompt]) -> None:
    """An empty text may have a token, where the tokenizer begins it with BOS.

    Raises:
        InvalidRequestError: a prompt has none.
    """
    if not all(prompt.token_ids for prompt in prompts):
        raise InvalidRequestError("prompt must not be empty: it has no tokens", param="prompt")


async def encode_chat(
    engine: EngineClient,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    template_kwargs: dict[str, Any],
) -> EncodedPrompt:
    """The messages through the model's own template; always in a thread, since a template is a program.

    Raises:
        InvalidRequestError: the model has no template, or the template refuses the messages.
    """
    tokenizer = engine.tokenizer
    if not tokenizer.has_chat_template:
        raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")

    def encode() -> EncodedPrompt:
        turns = [message.for_template() for message in messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, **template_kwargs)
        return EncodedPrompt(tokenizer.encode(text, add_special_tokens=False), text)

    try:
        encoded = await asyncio.to_thread(encode)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param=error.param or "messages") from error
    if not encoded.token_ids:
        raise InvalidRequestError("messages must not be empty: they have no tokens", param="messages")
    return encoded


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


def _encode(tokenizer: TokenizerClient, prompt: Prompt, add_special_tokens: bool) -> EncodedPrompt:
    if isinstance(prompt, str):
        return EncodedPrompt(tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt)
    return EncodedPrompt(prompt)


async def _off_loop(work: Callable[[], T], size: int) -> T:
    return work() if size <= INLINE_CHARS else await asyncio.to_thread(work)
