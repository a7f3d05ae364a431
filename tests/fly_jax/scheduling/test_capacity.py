"""How much context each layout holds, and contexts that no single device could hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fly_jax import LLM, RequestOutput, SamplingParams
from fly_jax.errors import ContextLengthError, LayoutError
from tests.support import small_llm, wait_until_running
from tests.tiny_models import CASES, random_token_ids, write_model

pytestmark = pytest.mark.slow  # its engines

BLOCKS, BLOCK_SIZE = 8, 16
ONE_DEVICE = BLOCKS * BLOCK_SIZE
LONG = tuple(random_token_ids(2 * ONE_DEVICE - 60, 256, seed=1))
LONG_PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
SHORT_PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path, {**CASES["llama_gqa_tied"], "max_position_embeddings": 1024, "num_key_value_heads": 4})
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with small_llm(folder, num_blocks=BLOCKS, block_size=BLOCK_SIZE, layouts=("1+1+1+1", "2+1+1", "2+2", "4")) as each:
        yield each


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[LLM]:
    """One device with room for everything."""
    with small_llm(folder, devices=1, num_blocks=16 * BLOCKS, block_size=BLOCK_SIZE) as each:
        yield each


def assert_same(output: RequestOutput, expected: RequestOutput) -> None:
    assert output.token_ids == expected.token_ids
    got, want = ([token.logprob for token in each.logprobs] for each in (output, expected))
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("layout", "widest"), [("1+1+1+1", 1), ("2+2", 2), ("2+1+1", 2), ("4", 4)])
def test_the_longest_context_of_a_layout_is_that_of_one_device_times_its_widest_group(
    llm: LLM, layout: str, widest: int
) -> None:
    llm.switch(layout)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([random_token_ids(widest * ONE_DEVICE - 1, 256)], params)
    assert len(output.token_ids) == 1  # the context is full then
    with pytest.raises(ContextLengthError, match=f"context length is {widest * ONE_DEVICE} tokens"):
        llm.generate([random_token_ids(widest * ONE_DEVICE, 256)], params)


def test_a_context_beyond_one_device_is_served_while_short_requests_stream_on_the_others(
    llm: LLM, reference: LLM
) -> None:
    llm.switch("2+1+1")
    shorts = [tuple(random_token_ids(10 + index, 256, seed=index)) for index in range(6)]
    expected = reference.generate([LONG, *shorts], [LONG_PARAMS] + [SHORT_PARAMS] * len(shorts))
    long_output: list[RequestOutput] = []
    serving = threading.Thread(target=lambda: long_output.extend(llm.generate([LONG], LONG_PARAMS)))
    serving.start()
    wait_until_running(llm)
    rounds = 0
    while serving.is_alive():
        for output, want in zip(llm.generate(shorts, SHORT_PARAMS), expected[1:], strict=True):
            assert_same(output, want)
        rounds += 1
    assert rounds >= 1
    assert_same(long_output[0], expected[0])


def test_a_long_context_moves_between_wide_layouts_and_is_never_squeezed_into_a_narrow_one(
    llm: LLM, reference: LLM
) -> None:
    (expected,) = reference.generate([LONG], LONG_PARAMS)
    llm.switch("2+2")
    outputs: list[RequestOutput] = []
    serving = threading.Thread(target=lambda: outputs.extend(llm.generate([LONG], LONG_PARAMS)))
    serving.start()
    wait_until_running(llm)
    with pytest.raises(LayoutError, match=f"would hold {ONE_DEVICE}"):
        llm.switch("1+1+1+1")
    reports = [llm.switch(layout) for layout in ("4", "2+2")]
    serving.join()
    assert_same(outputs[0], expected)
    assert [report.tokens_recomputed for report in reports] == [0, 0]
