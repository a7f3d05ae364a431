"""Lengths that fit a model, and the summary of a plan."""

from __future__ import annotations

import pytest

from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.workload_plan import Drafted, Lengths, fit, gather


@pytest.mark.parametrize(
    ("prompt", "output", "fitting"),
    [
        (60, 40, Lengths(60, 40, False)),
        (61, 40, Lengths(60, 40, True)),
        (500, 40, Lengths(60, 40, True)),
        (20, 90, Lengths(20, 80, True)),
        (500, 500, Lengths(50, 50, True)),
        (60, 500, Lengths(50, 50, True)),
        (0, 0, Lengths(1, 1, False)),
    ],
)
def test_the_output_keeps_up_to_half_of_the_context_and_the_prompt_the_rest(
    prompt: int, output: int, fitting: Lengths
) -> None:
    assert fit(prompt, output, 100) == fitting


def test_every_length_fits_and_is_at_least_one() -> None:
    for limit in range(2, 9):
        for prompt in range(12):
            for output in range(12):
                lengths = fit(prompt, output, limit)
                assert min(lengths.prompt, lengths.output) >= 1
                assert lengths.prompt + lengths.output <= limit
                assert lengths.clipped == (max(prompt, 1) + max(output, 1) > limit)


def test_a_plan_is_in_the_order_of_time_and_says_what_was_cut() -> None:
    late, early = (PlannedRequest(at, (11,) * 3, 3, 2) for at in (2.5, 1.0))
    planned = gather([Drafted(late, True), Drafted(early, False)], skipped=4, max_model_len=5)
    assert planned.requests == (early, late)
    assert planned.summary() == (
        "2 requests over 2.5 s, 6 prompt tokens, 4 output tokens; 1 clipped to 5 tokens, "
        "4 entries without a prompt or an output skipped"
    )
