"""The division of work covers every pair of query and context position exactly once, evenly, within its bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import QueryRuns
from kernels_pallas.work import Cut, Item, WorkSizes, divide

SIZES = WorkSizes(block_queries=8, tile_tokens=16, min_item_tiles=2, target_items=12)
DECODE = WorkSizes(block_queries=1, tile_tokens=16, min_item_tiles=2, target_items=12)
QUERIES = 4
RUNS = 12  # one shape, one compile
MAX_CONTEXT = 4000

Runs = Sequence[tuple[int, int, int]]
"""Table row, start and length of each."""


def divided(runs: Runs, sizes: WorkSizes, queries: int, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Items and cuts that exist."""
    padded = [*runs, *[(0, 0, 0)] * (RUNS - len(runs))]
    rows, starts, lengths = (jnp.asarray(column, jnp.int32) for column in np.array(padded).T)
    described = QueryRuns(jnp.zeros((1, 1), jnp.int32), rows, starts, lengths)
    items, cuts = (np.asarray(each) for each in _divide(described, queries, sizes, window))
    assert len(items) == sizes.max_items(RUNS, queries)
    assert len(cuts) == sizes.target_items
    return items[items[:, Item.END] > 0], cuts[cuts[:, Cut.SLOTS] > 0]


@partial(jax.jit, static_argnums=(1, 2, 3))
def _divide(runs: QueryRuns, queries: int, sizes: WorkSizes, window: int | None) -> tuple[jax.Array, jax.Array]:
    work = divide(runs, queries, sizes, window)
    return work.items, work.cuts


@st.composite
def prompts(draw: st.DrawFn) -> Runs:
    """Chunks of some requests' prompts, each in runs that follow one another, with padding between."""
    runs: list[tuple[int, int, int]] = []
    for row in range(draw(st.integers(0, 4))):
        start, count = draw(st.integers(0, MAX_CONTEXT)), draw(st.integers(1, 4 * QUERIES))
        chunk = [(row, start + first, min(QUERIES, count - first)) for first in range(0, count, QUERIES)]
        padding = [(draw(st.integers(0, 3)), 0, 0)] * draw(st.integers(0, 1))
        if len(runs) + len(chunk) + len(padding) <= RUNS:
            runs += chunk + padding
    return runs


def check(runs: Runs, sizes: WorkSizes, queries: int, window: int | None) -> None:
    items, cuts = divided(runs, sizes, queries, window)
    wanted = {
        (row, index * queries + offset): start + offset
        for index, (row, start, length) in enumerate(runs)
        for offset in range(length)
    }
    read: dict[tuple[int, int], list[tuple[int, int]]] = {key: [] for key in wanted}
    for item in items:
        assert 1 <= item[Item.COUNT] <= sizes.block_queries
        assert item[Item.BEGIN] % sizes.tile_tokens == 0
        for offset in range(item[Item.COUNT]):
            key = (item[Item.TABLE_ROW], item[Item.PLACE] + offset)
            assert wanted[key] == item[Item.POSITION] + offset
            read[key].append((item[Item.BEGIN], item[Item.END]))
    for key, position in wanted.items():
        spans = sorted(read[key])
        first_seen = 0 if window is None else max(0, position - window + 1)
        assert spans[0][0] <= first_seen
        assert spans[-1][1] > position
        assert all(before[1] == after[0] for before, after in pairwise(spans))
    check_slots(items, cuts, sizes)


def check_slots(items: np.ndarray, cuts: np.ndarray, sizes: WorkSizes) -> None:
    """Blocks of one item have no slot; the items of a cut block fill the slots that the cut names."""
    places = Counter(items[:, Item.PLACE].tolist())
    slots: list[int] = []
    for cut in cuts:
        mine = items[items[:, Item.PLACE] == cut[Cut.PLACE]]
        expected = range(cut[Cut.FIRST_SLOT], cut[Cut.FIRST_SLOT] + cut[Cut.SLOTS])
        assert sorted(mine[:, Item.SLOT]) == list(expected)
        assert (mine[:, Item.COUNT] == cut[Cut.COUNT]).all()
        slots += expected
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < sizes.max_slots for slot in slots)
    uncut = items[items[:, Item.SLOT] < 0]
    assert all(places[place] == 1 for place in uncut[:, Item.PLACE].tolist())
    assert len(uncut) + len(slots) == len(items)


@pytest.mark.slow
@settings(max_examples=60)
@given(prompts(), st.sampled_from([None, 1, 40]))
def test_prompt_chunks_are_covered_once(runs: Runs, window: int | None) -> None:
    check(runs, SIZES, QUERIES, window)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.integers(0, MAX_CONTEXT), max_size=RUNS), st.sampled_from([None, 1, 40]))
def test_decodes_are_covered_once(positions: list[int], window: int | None) -> None:
    check([(row, position, 1) for row, position in enumerate(positions)], DECODE, 1, window)


def test_runs_that_follow_one_another_share_query_blocks() -> None:
    items, _ = divided([(2, 8, 4), (2, 12, 4), (2, 16, 4), (2, 20, 1)], SIZES, QUERIES)
    assert sorted((item[Item.PLACE], item[Item.COUNT]) for item in items) == [(0, 8), (8, 5)]


def test_runs_of_others_or_with_a_gap_do_not() -> None:
    for second in ((1, 12, 4), (2, 13, 4), (2, 8, 4)):
        items, _ = divided([(2, 8, 4), second], SIZES, QUERIES)
        assert sorted(items[:, Item.COUNT]) == [4, 4]
    items, _ = divided([(2, 8, 3), (2, 12, 4)], SIZES, QUERIES)  # the first is not full, so the second starts anew
    assert sorted(items[:, Item.COUNT]) == [3, 4]


def test_one_long_context_becomes_as_many_items_as_fill_the_gpu() -> None:
    items, cuts = divided([(0, 100_000, 1)], DECODE, 1)
    assert len(items) == DECODE.target_items
    assert len(cuts) == 1
    tiles = -(-(items[:, Item.END] - items[:, Item.BEGIN]) // DECODE.tile_tokens)
    share = -(-6251 // 12)  # 100,001 positions are 6,251 tiles
    assert set(tiles[1:]) == {share}
    assert 0 < tiles[0] <= share  # the last positions come first


def test_even_contexts_are_not_cut_once_there_are_enough() -> None:
    items, cuts = divided([(row, 500, 1) for row in range(RUNS)], DECODE, 1)
    assert len(items) == RUNS
    assert len(cuts) == 0


def test_a_long_context_among_short_ones_is_cut_and_they_are_not() -> None:
    items, cuts = divided([(0, 3000, 1), *((row, 30, 1) for row in range(1, RUNS))], DECODE, 1)
    assert len(cuts) == 1
    assert cuts[0, Cut.PLACE] == 0
    assert len(items[items[:, Item.SLOT] < 0]) == RUNS - 1


def test_the_longest_contexts_of_a_prompt_start_first() -> None:
    items, _ = divided([(0, first, 4) for first in range(0, 40, 4)], SIZES, QUERIES)
    assert list(items[:, Item.POSITION]) == sorted(items[:, Item.POSITION], reverse=True)
