"""Prompts of random content."""

from __future__ import annotations

import pytest

from fly_jax.bench.random_prompts import RandomLengths, random_requests
from fly_jax.errors import ConfigError


def test_token_ids_leave_out_the_lowest_and_stay_in_the_vocabulary() -> None:
    requests = random_requests([0.0] * 20, RandomLengths(100, 5), 30, seed=0)
    ids = {token for request in requests for token in request.prompt}
    assert ids == set(range(10, 30))


def test_lengths_are_uniform_within_the_ratio_and_both_ends_come_up() -> None:
    requests = random_requests([0.0] * 2000, RandomLengths(8, 4, 0.5), 100, seed=1)
    assert {request.prompt_tokens for request in requests} == set(range(4, 13))
    assert {request.max_tokens for request in requests} == set(range(2, 7))
    assert all(len(request.prompt) == request.prompt_tokens for request in requests)
    assert RandomLengths(8, 4, 0.5).longest == 18


def test_without_a_ratio_every_length_is_the_one_given_and_times_are_kept() -> None:
    requests = random_requests([0.0, 0.5], RandomLengths(7, 3), 100, seed=1)
    assert [(request.at, request.prompt_tokens, request.max_tokens) for request in requests] == [(0, 7, 3), (0.5, 7, 3)]


def test_a_seed_repeats_the_prompts_and_another_does_not() -> None:
    first, same, other = (random_requests([0.0] * 5, RandomLengths(9, 3), 100, seed) for seed in (4, 4, 5))
    assert first == same != other


def test_as_text_there_are_as_many_words() -> None:
    (request,) = random_requests([0.0], RandomLengths(12, 3), 100, seed=1, as_text=True)
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split(" ")) == request.prompt_tokens == 12


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((0, 1), "--random-input-len"), ((1, 0), "--random-output-len"), ((1, 1, 1.0), "--random-range-ratio")],
)
def test_lengths_that_cannot_be_are_refused(lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandomLengths(*lengths)


def test_a_vocabulary_of_special_tokens_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="--vocab-size must be above 10, got 10"):
        random_requests([0.0], RandomLengths(1, 1), 10, seed=0)
