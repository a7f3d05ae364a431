"""A token on its own: its text as it is inside a text, and its real bytes."""

from __future__ import annotations

import pytest

from tests.fly_jax.tokenizer_families import BOS, family


def token_id(name: str, token: str) -> int:
    found = family(name)._tokenizer.token_to_id(token)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "token", "text"),
    [
        ("llama_2", "▁time", " time"), ("llama_2", "cat", "cat"), ("llama_2", "▁cat", " cat"),
        ("mistral", "▁time", " time"), ("unigram", "▁time", " time"), ("byte_level", "Ġtime", " time"),
        ("word_piece", "time", " time"),
        ("word_piece", "##s", "s"), ("llama_2", BOS, BOS), ("byte_level", BOS, BOS),
        ("llama_2", "<0xE2>", "\ufffd"), ("byte_level", "â", "\ufffd"),
    ],
)  # fmt: skip
def test_the_text_of_a_token_is_what_it_adds_inside_a_text(name: str, token: str, text: str) -> None:
    assert family(name).token_text(token_id(name, token)) == text


@pytest.mark.parametrize(
    ("name", "token", "data"),
    [
        ("llama_2", "<0xE2>", b"\xe2"), ("mistral", "<0x0A>", b"\n"), ("byte_level", "â", b"\xe2"),
        ("llama_2", "▁time", b" time"), ("byte_level", "Ġtime", b" time"), ("llama_2", BOS, b"<s>"),
    ],
)  # fmt: skip
def test_the_bytes_of_a_token_are_its_own_also_inside_a_character(name: str, token: str, data: bytes) -> None:
    assert family(name).token_bytes(token_id(name, token)) == data


def test_an_id_without_a_token_has_no_text() -> None:
    assert family("llama_2").token_text(10**6) == ""
    assert family("llama_2").token_bytes(10**6) == b""
