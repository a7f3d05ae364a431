from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import FinishReason
from fly_jax.text.output_processor import OutputProcessor
from fly_jax.text.text_stream import TextStream
from fly_jax.text.tokenizer import Tokenizer
from tests.fly_jax.builders import make_request
from tests.fly_jax.tokenizer_families import BOS, EOS, FAMILIES, TURN, family

TEXTS = [
    "Once upon a time there was a cat, the cat.",
    " the time",
    "the time  ",
    "  1 2\n\n 3\t4 ",
    "the 漢字 time 漢字漢字",
    "cat 😀 the😀👩‍👩‍👧 é a time",
    "naïve café “the”",
    "a\ufffdtime",
    f"time{TURN} the time {TURN}Once{EOS}",
]
LOSSLESS = ("llama_2", "mistral", "byte_level")


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip, prompt)
    return "".join(stream.push(token) for token in output) + stream.flush()


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    found = [tokenizer._tokenizer.token_to_id(token) for token in tokens]
    assert None not in found, tokens
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
def test_a_text_cut_anywhere_is_the_prompts_and_the_outputs_joined(name: str, text: str, skip: bool) -> None:
    tokenizer = family(name)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=skip)
    if name in ("llama_2", "byte_level") and not skip and TURN not in text:
        assert whole == text
    for cut in range(len(tokens) + 1):
        prompt, output = tokens[:cut], tokens[cut:]
        before = tokenizer.decode_prompt(prompt, skip_special_tokens=skip)
        assert before + continuation(tokenizer, prompt, output, skip) == whole, cut


@pytest.mark.parametrize(
    ("name", "first", "second", "text"),
    [
        ("llama_2", "▁a", "▁time", " time"),
        ("mistral", "▁a", "▁time", " time"),
        ("unigram", "▁a", "▁time", " time"),
        ("word_piece", "a", "time", " time"),
        ("word_piece", "cat", "##s", "s"),
        ("word_piece", "cat", ".", "."),
        ("byte_level", "Ġa", "Ġtime", " time"),
        ("llama_2", "▁", "▁time", " time"),
        ("llama_2", TURN, "▁time", "time"),  # as decoded alone: nothing that is written comes before it
        ("llama_2", BOS, "▁time", "time"),
        ("unigram", BOS, "▁time", "time"),
        ("byte_level", BOS, "Ġtime", " time"),
    ],
)
def test_a_first_token_reads_as_in_the_middle_of_a_text(name: str, first: str, second: str, text: str) -> None:
    """The values are what transformers 5.24 decodes of both tokens, less what it decodes of the first."""
    tokenizer = family(name)
    prompt, output = ids(tokenizer, first), ids(tokenizer, second)
    assert continuation(tokenizer, prompt, output) == text
    assert tokenizer.decode(prompt + output)[len(tokenizer.decode(prompt)) :] == text


def test_special_tokens_before_the_output_do_not_hide_the_text_before_them() -> None:
    tokenizer = family("llama_2")
    prompt = ids(tokenizer, BOS, "▁a", TURN, *[EOS] * 300)
    assert continuation(tokenizer, prompt, ids(tokenizer, "▁time")) == " time"
    assert continuation(tokenizer, prompt, ids(tokenizer, "▁time"), skip=False) == " time"


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("character", ["é", "漢", "😀"])
def test_a_character_that_the_prompt_leaves_unfinished_belongs_to_the_output(name: str, character: str) -> None:
    tokenizer = family(name)
    tokens = tokenizer.encode(f"the 漢字{character}", add_special_tokens=False)
    size = len(character.encode())
    for missing in range(1, size):
        prompt = tokens[:-missing]
        assert tokenizer.decode_prompt(prompt) == "the 漢字"
        assert continuation(tokenizer, prompt, tokens[-missing:]) == character
        other = tokenizer.encode("cat", add_special_tokens=False)
        assert continuation(tokenizer, prompt, other).lstrip("\ufffd") == continuation(tokenizer, tokens, other)


def test_a_replacement_character_in_the_prompt_is_no_unfinished_one() -> None:
    for name in LOSSLESS:
        tokenizer = family(name)
        prompt = tokenizer.encode("the \ufffd", add_special_tokens=False)
        assert tokenizer.decode_prompt(prompt) == "the \ufffd"
        assert continuation(tokenizer, prompt, tokenizer.encode("1", add_special_tokens=False)).lstrip() == "1"


@given(data=st.data(), name=st.sampled_from(LOSSLESS), text=st.text(max_size=12))
def test_any_text_cut_anywhere_comes_back(data: st.DataObject, name: str, text: str) -> None:
    tokenizer = family(name)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(tokens)))
    joined = tokenizer.decode_prompt(tokens[:cut]) + continuation(tokenizer, tokens[:cut], tokens[cut:])
    assert joined == tokenizer.decode(tokens)


@given(
    name=st.sampled_from(sorted(FAMILIES)), prompt=st.lists(st.integers(0, 400)), output=st.lists(st.integers(0, 400))
)
def test_any_tokens_have_a_continuation(name: str, prompt: list[int], output: list[int]) -> None:
    tokenizer = family(name)
    tokenizer.decode_prompt(prompt)
    continuation(tokenizer, prompt, output)


def test_only_the_end_of_a_long_prompt_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = family("llama_2"), list[int]()
    decode = TextStream._decode

    def counted(stream: TextStream) -> str:
        sizes.append(len(stream._tokens))
        return decode(stream)

    monkeypatch.setattr(TextStream, "_decode", counted)
    words = tokenizer.encode("the 漢字 time " * 1000)
    continuation(tokenizer, words, words[:300])
    assert max(sizes) <= 12


@pytest.mark.parametrize("name", ["llama_2", "mistral", "unigram", "word_piece", "byte_level"])
def test_a_stop_string_may_begin_with_the_first_space(name: str) -> None:
    tokenizer = family(name)
    tokens = tokenizer.encode("Once upon a time", add_special_tokens=False)
    end = next(n for n in range(len(tokens)) if tokenizer.decode(tokens[:n]).lower().endswith("upon a"))
    request = make_request(tokens[:end], stop=(" time",), max_tokens=9)
    processor = OutputProcessor(tokenizer, frozenset())
    processor.add(request)
    deltas = []
    for token in tokens[end:]:
        request.output_ids.append(token)
        deltas.append(processor.push(request, TokenLogprob(token, -0.5)))
    assert "".join(delta.text for delta in deltas) == ""
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, " time")
    assert all(delta.finish_reason is None for delta, _ in pairwise(deltas))
