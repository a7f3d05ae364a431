from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fly_jax.errors import InvalidRequestError
from fly_jax.sampling_params import MAX_LOGPROBS, MAX_PRIORITY, MAX_SEED, MAX_STOP_STRINGS, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1),
        ("temperature", -0.1), ("temperature", 100.5), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -2), ("top_k", 2**31),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", -1.0), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
        ("seed", -2), ("seed", MAX_SEED + 1),
        ("min_tokens", -1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("logprobs", -1), ("logprobs", MAX_LOGPROBS + 1),
        ("stop", ("",)), ("stop", ("a", "")), ("stop", ("a",) * (MAX_STOP_STRINGS + 1)),
        ("priority", MAX_PRIORITY + 1), ("priority", -MAX_PRIORITY - 1),
        ("tensor_parallel_size", 0), ("tensor_parallel_size", -2), ("tensor_parallel_size", 3),
        ("tensor_parallel_size", 12),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field} must be ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", None), ("max_tokens", 1),
        ("temperature", 0.0), ("temperature", 100.0),
        ("top_k", -1), ("top_k", 0), ("top_k", 2**31 - 1),
        ("top_p", 1e-9), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 1.0),
        ("seed", None), ("seed", 0), ("seed", MAX_SEED),
        ("logprobs", None), ("logprobs", 0), ("logprobs", MAX_LOGPROBS),
        ("stop", ()), ("stop", ("a",) * MAX_STOP_STRINGS),
        ("priority", MAX_PRIORITY), ("priority", -MAX_PRIORITY), ("priority", 0),
        ("tensor_parallel_size", None), ("tensor_parallel_size", 1), ("tensor_parallel_size", 8),
    ],
)  # fmt: skip
def test_values_at_the_limits_are_accepted_unchanged(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_min_tokens_above_max_tokens_is_refused_with_both_numbers() -> None:
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    assert SamplingParams(max_tokens=None, min_tokens=3).min_tokens == 3
    with pytest.raises(InvalidRequestError, match="min_tokens must be at most max_tokens 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_one_stop_string_is_not_taken_for_its_letters() -> None:
    stop: Any = "end"
    assert SamplingParams(stop=stop).stop == ("end",)
    sequence: Any = ["a", "b"]
    assert SamplingParams(stop=sequence, stop_token_ids=[3, 4]).stop == ("a", "b")
    hash(SamplingParams(stop=sequence))


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-6, True), (0.01, False), (1.0, False)])
def test_a_vanishing_temperature_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1.5), ("logprobs", 2.5), ("top_k", 2.5), ("max_tokens", "3"), ("min_tokens", True),
        ("temperature", "1"), ("top_p", None), ("min_p", True), ("stop", (3,)), ("stop_token_ids", ("x",)),
        ("ignore_eos", 1), ("prompt_logprobs", True), ("priority", 0.5), ("priority", "1"),
        ("tensor_parallel_size", 2.0), ("tensor_parallel_size", True), ("priority", None), ("min_tokens", None),
        ("top_k", None),
        ("stop_token_ids", (None,)),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_numbers_of_numpy_become_plain_ones() -> None:
    params = SamplingParams(seed=np.int32(7), temperature=np.float32(1.0), top_k=np.int64(3))  # type: ignore[arg-type]
    assert (type(params.seed), type(params.temperature), type(params.top_k)) == (int, float, int)


def test_seed_minus_one_draws_one_as_none_does() -> None:
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
