from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.device.buckets import Buckets
from fly_jax.scheduling.step import TILE_TOKENS, SchedulerLimits

limits = st.builds(SchedulerLimits, st.integers(1, 2000), st.integers(1, 20000))


@given(limits)
def test_the_last_bucket_holds_the_largest_step_and_sizes_ascend(limits: SchedulerLimits) -> None:
    buckets = Buckets.of(limits.max_num_seqs, limits.tile_budget(1, 1))
    for sizes, most in ((buckets.rows, limits.max_num_seqs), (buckets.tokens, limits.tile_budget(1, 1))):
        assert sizes[-1] >= most
        assert list(sizes) == sorted(set(sizes))
    assert all(size % TILE_TOKENS == 0 for size in buckets.tokens)


@given(limits, st.data())
def test_a_step_runs_in_the_smallest_bucket_that_holds_it(limits: SchedulerLimits, data: st.DataObject) -> None:
    sizes = Buckets.of(limits.max_num_seqs, limits.tile_budget(1, 1)).tokens
    needed = data.draw(st.integers(1, sizes[-1]))
    picked = Buckets.pick(sizes, needed)
    assert picked == min(size for size in sizes if size >= needed)


@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_no_step_has_a_single_row(max_num_seqs: int) -> None:
    assert min(Buckets.of(max_num_seqs, TILE_TOKENS).rows) == 2


def test_buckets_are_few() -> None:
    buckets = Buckets.of(256, 8192)
    assert len(buckets.rows) <= 4
    assert len(buckets.tokens) <= 5


@given(st.integers(1, 20000))
def test_the_tile_budget_is_whole_tiles_within_the_token_budget(tokens: int) -> None:
    budget = SchedulerLimits(1, tokens).tile_budget(1, 1)
    assert budget % TILE_TOKENS == 0
    assert budget <= max(tokens, 2 * TILE_TOKENS)
    assert tokens - budget < TILE_TOKENS


@given(limits, st.sampled_from([1, 2, 4, 8]))
def test_a_step_has_room_for_every_decode_and_a_chunk_of_a_prompt(limits: SchedulerLimits, tp: int) -> None:
    running = limits.max_running(tp, 1)
    assert running == tp * limits.max_running(1, 1)
    assert limits.tile_budget(tp, 1) >= running + TILE_TOKENS
