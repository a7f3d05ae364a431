"""The running engine on a tiny model: switching, seeds, stopping, failing, and never compiling again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fly_jax import LLM, RequestOutput, SamplingParams
from fly_jax.errors import ConfigError, ContextLengthError, InvalidRequestError, LayoutError, ModelTooLargeError
from fly_jax.outputs import SwitchStrategy
from tests.support import small_llm, wait_until_running
from tests.tiny_models import CASES, random_token_ids, write_model

pytestmark = pytest.mark.slow  # its engines

LAYOUTS = ("1+1+1+1", "2+2", "4", "2+1+1", "1+1+2")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_k=40, top_p=0.95, seed=11, ignore_eos=True)
PROMPT_LENGTHS = (3, 17, 33, 64, 120, 150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path, {**CASES["llama_gqa_tied"], "max_position_embeddings": 512})
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    # Two buckets of each kind.
    with small_llm(folder, max_num_seqs=12, max_num_batched_tokens=192) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _back_to_the_first_layout(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").switch(LAYOUTS[0])


def prompts() -> list[tuple[int, ...]]:
    return [tuple(random_token_ids(length, 256, seed=length)) for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[RequestOutput]:
    """Each prompt alone in a layout that never switches."""
    llm.switch("1+1+1+1")
    return [llm.generate(prompt, GREEDY)[0] for prompt in prompts()]


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        assert output.token_ids == reference.token_ids
        got, want = ([token.logprob for token in each.logprobs] for each in (output, reference))
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_gives_in_every_layout_what_each_prompt_gives_alone(
    llm: LLM, expected: list[RequestOutput], layout: str
) -> None:
    llm.switch(layout)
    assert llm.layout == layout
    assert_same(llm.generate(prompts(), GREEDY), expected)


@pytest.mark.parametrize("strategy", [str(strategy) for strategy in SwitchStrategy])
def test_requests_in_flight_finish_correctly_across_switches(
    llm: LLM, expected: list[RequestOutput], strategy: str
) -> None:
    reports = []

    def switch_around() -> None:
        for layout in ("2+2", "4", "2+1+1", "1+1+1+1"):
            wait_until_running(llm)
            reports.append(llm.switch(layout, strategy))

    switcher = threading.Thread(target=switch_around)
    switcher.start()
    outputs = []
    while switcher.is_alive():
        outputs.append(llm.generate(prompts(), GREEDY))
    for batch in outputs:
        assert_same(batch, expected)
    assert [report.target for report in reports] == ["2+2", "4", "2+1+1", "1+1+1+1"]
    if strategy == "migrate":
        assert all(report.drain_seconds == report.tokens_recomputed == 0 for report in reports)
        assert max(report.requests_moved for report in reports) > 0
    else:
        assert all(report.requests_moved == 0 for report in reports)


def test_a_seed_gives_the_same_tokens_in_any_batch_and_layout(llm: LLM) -> None:
    prompt = prompts()[2]
    alone = llm.generate(prompt, SAMPLED)[0].token_ids
    assert alone != llm.generate(prompt, replace(SAMPLED, seed=12))[0].token_ids
    for layout in LAYOUTS:
        llm.switch(layout)
        crowd = [SAMPLED, *(replace(SAMPLED, seed=seed, top_k=0, temperature=1.3) for seed in range(7))]
        assert llm.generate([prompt] * len(crowd), crowd)[0].token_ids == alone


def test_unseeded_requests_differ_from_each_other(llm: LLM) -> None:
    outputs = llm.generate([prompts()[0]] * 4, replace(SAMPLED, seed=None))
    assert len({output.token_ids for output in outputs}) > 1


def test_nothing_compiles_and_no_block_leaks_over_every_bucket_and_layout(llm: LLM) -> None:
    for layout in LAYOUTS:
        llm.switch(layout)
        for batch in (1, 12, 40):
            params = replace(GREEDY, max_tokens=3, prompt_logprobs={1: None, 12: 0, 40: 2}[batch])
            llm.generate([prompts()[index % len(PROMPT_LENGTHS)] for index in range(batch)], params)
    stats = llm.stats()
    assert stats.compiles_after_warmup == 0
    assert stats.free_blocks == (stats.num_blocks,) * 4
    assert stats.running == stats.waiting == 0


def test_scores_are_the_same_in_every_layout(llm: LLM) -> None:
    tokens = random_token_ids(300, 256, seed=5)
    reference = llm.score(tokens)
    assert reference.shape == (299,)
    for layout in LAYOUTS[1:]:
        llm.switch(layout)
        np.testing.assert_allclose(llm.score(tokens), reference, atol=2e-4, rtol=0)


def test_sampled_log_probabilities_equal_teacher_forced_ones(llm: LLM, expected: list[RequestOutput]) -> None:
    output = expected[3]
    scored = llm.score([*output.prompt_token_ids, *output.token_ids])[len(output.prompt_token_ids) - 1 :]
    np.testing.assert_allclose([token.logprob for token in output.logprobs], scored, atol=2e-4, rtol=0)


def test_alternatives_are_ordered_and_hold_the_greedy_token(llm: LLM) -> None:
    (output,) = llm.generate(prompts()[1], replace(GREEDY, logprobs=5))
    for token in output.logprobs:
        assert len(token.top) == 5
        assert token.top[0] == (token.token_id, pytest.approx(token.logprob))
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)


@pytest.mark.parametrize("layout", ["1+1+1+1", "2+2", "4"])
def test_prompt_alternatives_are_those_that_each_place_gives_when_it_is_the_last(llm: LLM, layout: str) -> None:
    """The oracle is the generating path: the same prefix as a prompt, and the alternatives of its first token."""
    llm.switch(layout)
    prompt = random_token_ids(200, 256, seed=3)  # more than one chunk
    ends = (1, 15, 16, 17, 100, 191, 192, 193, 199)
    scored, *generated = llm.generate(
        [prompt, *(prompt[:end] for end in ends)],
        [replace(GREEDY, max_tokens=1, prompt_logprobs=5), *[replace(GREEDY, max_tokens=1, logprobs=20)] * len(ends)],
    )
    assert scored.prompt_logprobs is not None
    entries = list(scored.prompt_logprobs)
    assert [entry.token_id for entry in entries] == prompt[1:]
    np.testing.assert_allclose([entry.logprob for entry in entries], llm.score(prompt), atol=2e-4, rtol=0)
    for end, output in zip(ends, generated, strict=True):
        entry, (expected,) = entries[end - 1], output.logprobs
        assert len(entry.top) == 5
        assert [token for token, _ in entry.top] == [token for token, _ in expected.top[:5]]
        np.testing.assert_allclose([v for _, v in entry.top], [v for _, v in expected.top[:5]], atol=2e-4, rtol=0)
        likely = [token for token, _ in expected.top]
        if prompt[end] in likely:
            assert entry.rank == likely.index(prompt[end]) + 1
        else:
            assert entry.rank is not None
            assert entry.rank > 20
    assert llm.stats().compiles_after_warmup == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_min_tokens_masks_end_and_stop_tokens_while_steps_overlap(folder: Path, llm: LLM, overlap: bool) -> None:
    """The fifth greedy token, made a stop token: it comes no more before ``min_tokens`` others, and may come then."""
    prompt = prompts()[1]
    (free,) = llm.generate(prompt, GREEDY)
    stop = free.token_ids[4]
    stopped = replace(GREEDY, stop_token_ids=(stop,), logprobs=20, max_tokens=12)
    with small_llm(folder, layouts=("2+1+1",), overlap=overlap, max_num_seqs=2) as other:
        (short,) = other.generate(prompt, stopped)
        long, *_ = other.generate([prompt] * 5, replace(stopped, min_tokens=10))
    assert (short.stop_reason, len(short.token_ids)) == (stop, free.token_ids.index(stop) + 1)
    assert stop not in long.token_ids[:10]
    assert len(long.token_ids) > 10
    # Log-probabilities are the model's own, so the masked token leads them, and the one sampled comes after it.
    place = free.token_ids.index(stop)
    masked = long.logprobs[place]
    assert long.token_ids[:place] == free.token_ids[:place]
    assert masked.top[0][0] == stop
    assert masked.token_id == masked.top[1][0]
    assert masked.logprob == pytest.approx(masked.top[1][1])


def test_more_stop_tokens_than_min_tokens_can_mask_are_refused(llm: LLM) -> None:
    params = replace(GREEDY, min_tokens=1, stop_token_ids=tuple(range(40)))
    with pytest.raises(InvalidRequestError, match="min_tokens can mask 32 end and stop tokens, got 42"):
        llm.generate([[5, 6]], params)


def test_a_full_pool_preempts_and_still_gives_the_right_tokens(folder: Path, llm: LLM) -> None:
    crowd = [tuple(random_token_ids(17, 256, seed=seed)) for seed in range(8)]
    params = replace(GREEDY, max_tokens=60)
    # Eight requests of 77 tokens want five blocks of 16 each, and a device has 16.
    with small_llm(folder, max_num_seqs=8, num_blocks=16, block_size=8, layouts=("4",)) as tight:
        assert_same(tight.generate(crowd, params), llm.generate(crowd, params))
        stats = tight.stats()
        assert stats.preemptions > 0
        assert stats.free_blocks == (16,) * 4


@pytest.mark.parametrize("options", [{"overlap": False}, {"base_tp": 2, "layouts": ("2+2", "4")}])
def test_the_plain_loop_and_a_base_degree_of_two_give_the_same(
    folder: Path, expected: list[RequestOutput], options: dict[str, object]
) -> None:
    with small_llm(folder, **{"layouts": ("2+1+1",), **options}) as other:
        assert_same(other.generate(prompts(), GREEDY), expected)
        if "base_tp" in options:
            other.switch("4")
            assert_same(other.generate(prompts(), GREEDY), expected)
            with pytest.raises(LayoutError, match="base TP 2"):
                other.switch("1+1+1+1")


def test_base_degree_is_found_from_the_memory_given(folder: Path) -> None:
    with pytest.raises(ModelTooLargeError, match="a device has 1,000"):
        small_llm(folder, device_memory_bytes=1000)
    with pytest.raises(LayoutError, match="base TP 2"):
        small_llm(folder, device_memory_bytes=400_000, num_blocks=2, layout="1+1+1+1")


def test_bad_requests_are_refused_and_take_nobody_with_them(llm: LLM, expected: list[RequestOutput]) -> None:
    with pytest.raises(ContextLengthError, match=r"context length is 512 tokens, but the prompt has 600"):
        llm.generate([[5] * 600], GREEDY)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.generate([[1, 10**6]], GREEDY)
    with pytest.raises(LayoutError, match=r"uses 3 devices .* has 4"):
        llm.switch("2+1")
    assert_same(llm.generate(prompts(), GREEDY), expected)


def test_the_context_limit_ends_a_request_with_length(llm: LLM) -> None:
    (output,) = llm.generate([random_token_ids(500, 256, seed=1)], replace(GREEDY, max_tokens=None))
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 12


def test_layouts_that_were_not_compiled_are_refused(folder: Path) -> None:
    with small_llm(folder, layouts=("4",)) as narrow, pytest.raises(LayoutError, match="--layouts left out"):
        narrow.switch("2+2")


def test_more_devices_than_there_are_is_one_clear_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="already started with"):
        small_llm(folder, devices=64)


def test_bfloat16_stays_close_to_float32(folder: Path, llm: LLM) -> None:
    tokens = random_token_ids(100, 256, seed=9)
    with small_llm(folder, dtype="bfloat16", layouts=("2+1+1",)) as half:
        difference = np.abs(half.score(tokens) - llm.score(tokens))
    assert difference.mean() < 0.1


def test_a_batch_larger_than_the_queue_is_served_whole(folder: Path) -> None:
    with small_llm(folder, layouts=("4",), max_num_queued_reqs=2) as short_queue:
        outputs = short_queue.generate([[5, 6, 7]] * 12, replace(GREEDY, max_tokens=2))
    assert [len(output.token_ids) for output in outputs] == [2] * 12


def test_token_ids_that_are_not_integers_are_refused_and_take_nobody_with_them(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="integers"):
        llm.generate([[1.5, 2.5]], GREEDY)  # type: ignore[list-item]
    for prompts in ([True, 5], [[5, True]]):
        with pytest.raises(InvalidRequestError, match="integers: got a boolean"):
            llm.generate(prompts, GREEDY)
    assert llm.generate([np.array([5, 6, 7])], replace(GREEDY, max_tokens=2))[0].prompt_token_ids == (5, 6, 7)
