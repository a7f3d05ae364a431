from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import FinishReason, RequestDelta
from fly_jax.scheduling.request import Request
from fly_jax.text.output_processor import OutputProcessor
from fly_jax.text.stop_strings import StopMatcher
from fly_jax.text.tokenizer import Tokenizer
from tests.fly_jax.builders import make_request, make_tokenizer, own_logprobs
from tests.tiny_models import EOS_ID, IM_END_ID, IM_START_ID

letters = st.text(alphabet="ab", max_size=12)


def chunks(text: str) -> st.SearchStrategy[list[str]]:
    cuts = st.sets(st.integers(0, len(text))).map(lambda inner: sorted({0, len(text), *inner}))
    return cuts.map(lambda edges: [text[a:b] for a, b in pairwise(edges)])


def byte_tokens(text: str) -> list[int]:
    """One token a byte: multi-byte characters are spread over several tokens."""
    return list(text.encode())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def processor(tokenizer: Tokenizer) -> OutputProcessor:
    return OutputProcessor(tokenizer, frozenset({EOS_ID}))


def push_all(processor: OutputProcessor, request: Request, tokens: Iterable[int]) -> list[RequestDelta]:
    """Deltas up to the one that finishes the request."""
    processor.add(request)
    deltas = []
    for token in tokens:
        request.output_ids.append(token)
        deltas.append(processor.push(request, TokenLogprob(token, -0.5)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(deltas: list[RequestDelta]) -> str:
    return "".join(delta.text for delta in deltas)


class TestStopMatcher:
    @given(st.data(), letters, st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
    def test_text_up_to_the_first_stop_comes_out_however_it_is_cut(
        self, data: st.DataObject, text: str, stops: list[str]
    ) -> None:
        matcher, emitted, fed, found = StopMatcher(tuple(stops)), "", "", None
        for chunk in data.draw(chunks(text)):
            fed += chunk
            certain, found = matcher.push(chunk)
            emitted += certain
            if found is not None:
                break
            assert not any(stop in fed for stop in stops)
            held = fed[len(emitted) :]
            assert not held or any(stop.startswith(held) for stop in stops)
        if found is None:
            assert emitted + matcher.flush() == text
        else:
            assert emitted == fed[: min(fed.find(stop) for stop in stops if stop in fed)]
            assert fed.startswith(emitted + found)
            assert matcher.flush() == ""

    def test_no_more_is_held_back_than_may_become_a_stop(self) -> None:
        matcher = StopMatcher(("###", "END"))
        assert matcher.push("one #") == ("one ", None)
        assert matcher.push("#E") == ("##", None)
        assert matcher.push("NDS") == ("", "END")

    def test_nothing_is_held_back_without_stops(self) -> None:
        assert StopMatcher(()).push("any text") == ("any text", None)

    def test_comparisons_grow_with_the_text_and_not_with_the_stop_string(self) -> None:
        """The text is for ever on the way to become the stop string."""
        compared = 0

        class Counted(str):
            def __getitem__(self, place: Any) -> str:
                nonlocal compared
                compared += 1
                return super().__getitem__(place)

        matcher = StopMatcher((Counted("a" * 500 + "b" + "a" * 500), "a" * 999 + "c"))
        emitted = "".join(matcher.push("aaaa")[0] for _ in range(1000))
        assert emitted + matcher.flush() == "a" * 4000
        assert compared <= 4 * 4000


def test_a_stop_string_is_found_across_token_borders_and_cut_off(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(stop=("\n\nQ:",), max_tokens=99), byte_tokens("yes\n\nQ: no"))
    assert text_of(deltas) == "yes"
    assert [delta.text for delta in deltas] == ["y", "e", "s", "", "", "", ""]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == "\n\nQ:"
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert deltas[-1].num_output_tokens == 7


def test_text_that_did_not_become_a_stop_string_is_not_lost(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(stop=("abc",), max_tokens=4), byte_tokens("abab"))
    assert [delta.text for delta in deltas] == ["", "", "ab", "ab"]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].stop_reason is None


@pytest.mark.slow
@given(text=st.text(min_size=1, max_size=20))
def test_multi_byte_characters_are_never_split(tokenizer: Tokenizer, text: str) -> None:
    tokens = byte_tokens(text)
    deltas = push_all(OutputProcessor(tokenizer, frozenset()), make_request(max_tokens=len(tokens)), tokens)
    assert text_of(deltas) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta.text for delta in deltas)
    assert [token for delta in deltas for token in delta.token_ids] == tokens


def test_bytes_of_an_unfinished_character_come_out_as_a_replacement_character(processor: OutputProcessor) -> None:
    tokens = byte_tokens("a€")[:-1]
    deltas = push_all(processor, make_request(max_tokens=len(tokens)), tokens)
    assert [delta.text for delta in deltas] == ["a", "", "\ufffd"]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("min_tokens", [0, 4, 7])
def test_no_stop_is_honoured_before_min_tokens(processor: OutputProcessor, min_tokens: int) -> None:
    tokens = [*byte_tokens("a!b"), EOS_ID, IM_END_ID, *byte_tokens("!c"), EOS_ID, *byte_tokens("!")]
    request = make_request(stop=("!",), stop_token_ids=(IM_END_ID,), min_tokens=min_tokens, max_tokens=99)
    last = push_all(processor, request, tokens)[-1]
    expected = {0: (2, "!"), 4: (5, IM_END_ID), 7: (8, None)}[min_tokens]
    assert (last.num_output_tokens, last.stop_reason) == expected
    assert last.finish_reason is FinishReason.STOP


@given(text=st.text("ab", min_size=1, max_size=12), stop=st.text("ab", min_size=1, max_size=4), data=st.data())
def test_a_stop_string_counts_where_it_is_complete(
    tokenizer: Tokenizer, text: str, stop: str, data: st.DataObject
) -> None:
    """As in vLLM, one that begins before ``min_tokens`` ends the request; one that is complete by then does not."""
    min_tokens = data.draw(st.integers(0, len(text)))
    request = make_request(stop=(stop,), min_tokens=min_tokens, max_tokens=len(text))
    deltas = push_all(OutputProcessor(tokenizer, frozenset()), request, byte_tokens(text))
    end = next((n for n in range(min_tokens + 1, len(text) + 1) if text[:n].endswith(stop)), None)
    if end is None:
        assert (text_of(deltas), deltas[-1].finish_reason) == (text, FinishReason.LENGTH)
    else:
        assert (text_of(deltas), deltas[-1].stop_reason) == (text[: end - len(stop)], stop)
        assert deltas[-1].num_output_tokens == end


def test_a_stop_string_in_the_last_text_is_the_reason_for_the_end(processor: OutputProcessor) -> None:
    """A token may hold a letter and the beginning of a character that never comes."""
    deltas = push_all(processor, make_request(stop=("\ufffd",), max_tokens=2), byte_tokens("a\u20ac")[:2])
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("a", FinishReason.STOP, "\ufffd")


def test_a_stop_token_ends_the_request_and_is_not_part_of_the_text(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(stop_token_ids=(ord("c"),), max_tokens=9), byte_tokens("abcd"))
    assert text_of(deltas) == "ab"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, ord("c"))
    assert deltas[-1].token_ids == (ord("c"),)


def test_the_models_own_end_has_no_stop_reason(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(max_tokens=9), [*byte_tokens("ab"), EOS_ID, *byte_tokens("c")])
    assert text_of(deltas) == "ab"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on_after_the_models_end_but_not_after_stop_tokens(processor: OutputProcessor) -> None:
    tokens = [*byte_tokens("a"), EOS_ID, *byte_tokens("b"), IM_END_ID, *byte_tokens("c")]
    request = make_request(ignore_eos=True, stop_token_ids=(IM_END_ID,), max_tokens=9)
    deltas = push_all(processor, request, tokens)
    assert text_of(deltas) == "ab"
    assert deltas[-1].stop_reason == IM_END_ID


def test_text_held_back_for_a_stop_string_comes_out_when_a_stop_token_ends_the_request(
    processor: OutputProcessor,
) -> None:
    deltas = push_all(processor, make_request(stop=("bcd",), max_tokens=9), [*byte_tokens("abc"), EOS_ID])
    assert [delta.text for delta in deltas] == ["a", "", "", "bc"]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason is None


def test_an_end_on_the_last_allowed_token_is_a_stop(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(max_tokens=2), [*byte_tokens("a"), EOS_ID])
    assert deltas[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|im_start|>b")])
def test_special_tokens_are_left_out_of_the_text_unless_asked_for(
    processor: OutputProcessor, skip: bool, text: str
) -> None:
    tokens = [*byte_tokens("a"), IM_START_ID, *byte_tokens("b")]
    assert text_of(push_all(processor, make_request(skip_special_tokens=skip, max_tokens=3), tokens)) == text


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_logprobs_come_with_each_token_only_when_asked_for(processor: OutputProcessor, logprobs: int | None) -> None:
    deltas = push_all(processor, make_request(logprobs=logprobs, max_tokens=2), byte_tokens("ab"))
    expected = [] if logprobs is None else [TokenLogprob(token, -0.5) for token in byte_tokens("ab")]
    assert [entry for delta in deltas for entry in delta.logprobs] == expected


def test_prompt_logprobs_come_once_with_the_first_delta(processor: OutputProcessor) -> None:
    request = make_request([1, 2, 3], prompt_logprobs=0, max_tokens=2)
    request.prompt_logprobs = [own_logprobs([2], [-1.0]), own_logprobs([3], [-2.0])]
    first, second = push_all(processor, request, byte_tokens("ab"))
    assert first.prompt_logprobs is not None
    assert list(first.prompt_logprobs) == [TokenLogprob(2, -1.0, (), 1), TokenLogprob(3, -2.0, (), 1)]
    assert second.prompt_logprobs is None
    assert push_all(processor, make_request(name="other"), byte_tokens("a"))[0].prompt_logprobs is None


def test_requests_do_not_share_text_state(processor: OutputProcessor) -> None:
    one, other = make_request(name="one", stop=("ab",)), make_request(name="other", stop=("ab",))
    processor.add(one)
    processor.add(other)
    texts = {"one": "", "other": ""}
    for request, letter in [(one, "a"), (other, "b"), (one, "c"), (other, "c")]:
        request.output_ids.append(ord(letter))
        delta = processor.push(request, TokenLogprob(ord(letter), 0.0))
        assert delta.finish_reason is None
        texts[request.request_id] += delta.text
    assert texts == {"one": "ac", "other": "bc"}
    processor.discard(one)
    with pytest.raises(KeyError):
        processor.push(one, TokenLogprob(1, 0.0))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", ["<|im_end|>", "\n<|im_end|>", "<|im_end|>\n", "b\n<|im_end|><|im_start|>"])
def test_a_stop_string_with_special_tokens_matches_though_they_are_hidden(
    processor: OutputProcessor, stop: str, skip: bool
) -> None:
    tokens = [*byte_tokens("ab\n"), IM_END_ID, *([] if "<|im_start|>" in stop else byte_tokens("\n")), IM_START_ID]
    deltas = push_all(processor, make_request(stop=("zz", stop), skip_special_tokens=skip, max_tokens=99), tokens)
    written = "ab\n<|im_end|>\n<|im_start|>" if "im_start" not in stop else "ab\n<|im_end|><|im_start|>"
    assert text_of(deltas) == written[: written.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, stop)


def test_a_hidden_token_alone_is_neither_a_stop_string_nor_written(processor: OutputProcessor) -> None:
    tokens = [*byte_tokens("a"), IM_END_ID, *byte_tokens("b!c")]
    request = make_request(stop=("<|im_end|>\n", "b!"), max_tokens=99)
    deltas = push_all(processor, request, tokens)
    assert (text_of(deltas), deltas[-1].stop_reason) == ("a", "b!")


def test_a_stop_string_that_spells_a_special_token_out_matches_too(processor: OutputProcessor) -> None:
    deltas = push_all(processor, make_request(stop=("<|im_end|>",), max_tokens=99), byte_tokens("a<|im_end|>b"))
    assert (text_of(deltas), deltas[-1].stop_reason) == ("a", "<|im_end|>")


def test_text_held_back_for_a_hidden_stop_is_not_lost(processor: OutputProcessor) -> None:
    tokens = [*byte_tokens("a"), IM_END_ID, *byte_tokens("b")]
    deltas = push_all(processor, make_request(stop=("a<|im_end|>c",), max_tokens=3), tokens)
    assert (text_of(deltas), deltas[-1].finish_reason) == ("ab", FinishReason.LENGTH)
