from __future__ import annotations

from typing import Any

import pytest

from fly_jax.errors import ContextLengthError, InvalidRequestError
from serving.protocol import ChatCompletionRequest, CompletionRequest, LayoutRequest, TokenizeRequest
from serving.reading import COUNTED_CHARS, Reader
from tests.serving.scripted_engine import VOCAB_SIZE, ByteTokenizer

LIMIT = 512


class Untouched(ByteTokenizer):
    """Of a text that is too long nobody should ask for the tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
        raise AssertionError(f"tokenized {len(text)} characters")


class Unknowing(ByteTokenizer):
    """As some tokenizers are: any text might be few tokens."""

    def fewest_tokens(self, characters: int) -> int:  # noqa: ARG002
        return 0


def reader_of(tokenizer: ByteTokenizer) -> Reader:
    return Reader(tokenizer, LIMIT, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("body", "count", "param"),
    [
        (CompletionRequest(prompt="x" * (COUNTED_CHARS + 1)), "at least 65537", "prompt"),
        (CompletionRequest(prompt=["x" * (COUNTED_CHARS + 1), "hi"]), "at least 65537", "prompt"),
        (
            ChatCompletionRequest(messages=[{"role": "user", "content": "x" * COUNTED_CHARS}]),
            "at least 65556",
            "messages",
        ),
        (CompletionRequest(prompt=[1] * LIMIT), "512", "prompt"),
        (CompletionRequest(prompt=[VOCAB_SIZE] * 10**5), "100000", "prompt"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(body: Any, count: str, param: str) -> None:
    with pytest.raises(ContextLengthError) as caught:
        reader_of(Untouched()).read(body)
    assert f"maximum context length is {LIMIT} tokens, but the prompt has {count} and needs" in str(caught.value)
    assert caught.value.param == param


def test_what_may_fit_is_tokenized() -> None:
    text = "x" * (COUNTED_CHARS + 1)
    assert len(reader_of(Unknowing()).completion(CompletionRequest(prompt=text))[0].token_ids) == len(text) + 1
    # The engine says exactly how long a shorter text is.
    assert len(reader_of(ByteTokenizer()).completion(CompletionRequest(prompt="x" * LIMIT))[0].token_ids) > LIMIT
    # No context is asked for.
    assert len(reader_of(ByteTokenizer()).tokenize(TokenizeRequest(prompt=text))) > len(text)


def test_a_body_of_another_kind_is_a_mistake_of_the_servers() -> None:
    with pytest.raises(TypeError, match="LayoutRequest"):
        reader_of(ByteTokenizer()).read(LayoutRequest(layout="2+2"))


def test_a_template_is_refused_by_the_field_that_it_renders() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        reader_of(ByteTokenizer()).read(ChatCompletionRequest(messages=[{"role": "user", "content": "@refuse"}]))
    assert caught.value.param == "messages"
