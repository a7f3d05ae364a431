from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array

from kernels_pallas import KVLayout, paged_attention, write_kv
from kernels_pallas.paged import storage_dtype

BLOCK = 4
CHUNK_BLOCKS = 2
TABLE_BLOCKS = 8
LAYERS = 2
DIM = 16
NUM_BLOCKS = 40
SCALE = DIM**-0.5
# One token, around one block, around one chunk of the loop, and several chunks.
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, TABLE_BLOCKS * BLOCK)
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def make_layout(heads: int, dtype: np.dtype[Any]) -> KVLayout:
    return KVLayout((LAYERS, 2, heads, BLOCK, DIM), CHUNK_BLOCKS, dtype)


class Pool:
    """A pool of NaN, in which some requests' contexts are written to blocks in random order."""

    def __init__(self, lengths: Sequence[int], *, heads: int, dtype: np.dtype[Any], layer: int = 1) -> None:
        rng = np.random.default_rng(sum(lengths) + heads)
        self.lengths, self.layer, self.layout = lengths, layer, make_layout(heads, dtype)
        values = rng.normal(size=(2, len(lengths), max((*lengths, 1)), heads, DIM)).astype(np.float32).astype(dtype)
        self.keys, self.values = values
        order = iter(rng.permutation(NUM_BLOCKS))
        self.tables = np.zeros((len(lengths), TABLE_BLOCKS), np.int32)
        blocks = np.full((NUM_BLOCKS, *self.layout.block_shape), np.nan, dtype)
        unused = next(order)
        for row, length in enumerate(lengths):
            used = -(-length // BLOCK)
            self.tables[row] = unused
            self.tables[row, :used] = [next(order) for _ in range(used)]
            for position in range(length):
                block, offset = self.tables[row, position // BLOCK], position % BLOCK
                blocks[block, layer, 0, :, offset] = self.keys[row, position]
                blocks[block, layer, 1, :, offset] = self.values[row, position]
        self.bits = jnp.asarray(blocks.reshape(NUM_BLOCKS, -1).view(storage_dtype(dtype)))

    def expected(self, row: int, query: np.ndarray, window: int | None) -> np.ndarray:
        """Of the row's last queries."""
        length = self.lengths[row]
        key, value = self.keys[row, :length], self.values[row, :length]
        return dense_attention(query, key, value, window)


def dense_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int | None) -> np.ndarray:
    """The definition, in float64: ``query [queries, heads, group, dim]`` are the last positions of the context."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    positions = np.arange(len(key) - len(query), len(key))[:, None]
    places = np.arange(len(key))[None, :]
    seen = (places <= positions) & (places > positions - (window or len(key)))
    scores = np.where(seen, np.einsum("qhgd,thd->hgqt", query, key) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hgqt,thd->qhgd", weights / weights.sum(axis=-1, keepdims=True), value)


@cache
def attention(layout: KVLayout, layer: int, window: int | None) -> Any:
    def run(query: Array, pool: Array, tables: Array, starts: Array, lengths: Array) -> Array:
        return paged_attention(query, pool, layer, tables, starts, lengths, layout, scale=SCALE, window=window)

    return jax.jit(run)


def attend(pool: Pool, query: np.ndarray, counts: Sequence[int], window: int | None = None) -> np.ndarray:
    """Attention of the last ``counts[row]`` positions of each row; ``query [rows, queries, heads, group, dim]``."""
    starts = np.array([max(0, length - count) for length, count in zip(pool.lengths, counts, strict=True)], np.int32)
    run = attention(pool.layout, pool.layer, window)
    return np.asarray(run(query, pool.bits, pool.tables, starts, np.array(counts, np.int32))).astype(np.float32)


def queries(rows: int, count: int, heads: int, group: int, dtype: np.dtype[Any] = DTYPES[0]) -> np.ndarray:
    shape = (rows, count, heads, group, DIM)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(DTYPES[0], None), (DTYPES[0], 3), *((DTYPES[1], window) for window in (None, 1, BLOCK, 9))],
    ids=str,
)
def test_a_decode_step_equals_dense_attention_at_every_length(dtype: np.dtype[Any], window: int | None) -> None:
    pool = Pool(LENGTHS, heads=2, dtype=dtype)
    query = queries(len(LENGTHS), 1, heads=2, group=3)
    result = attend(pool, query, [1] * len(LENGTHS), window)
    for row in range(len(LENGTHS)):
        np.testing.assert_allclose(result[row], pool.expected(row, query[row], window), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("heads", "group", "window"), [(1, 1, None), (1, 8, 2), (4, 1, BLOCK + 1), (3, 2, None), (3, 2, BLOCK + 1)]
)
def test_a_prompt_chunk_equals_dense_attention_at_every_start(heads: int, group: int, window: int | None) -> None:
    pool = Pool(LENGTHS, heads=heads, dtype=DTYPES[1])
    counts = [min(length, 6) for length in LENGTHS]
    query = queries(len(LENGTHS), 6, heads, group)
    result = attend(pool, query, counts, window)
    for row, count in enumerate(counts):
        expected = pool.expected(row, query[row, :count], window)
        np.testing.assert_allclose(result[row, :count], expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [3, 9])
def test_a_window_is_seen_whole_where_the_loop_starts_beyond_the_first_chunk(window: int) -> None:
    lengths = (30, 32, 27)
    pool = Pool(lengths, heads=2, dtype=DTYPES[1])
    query = queries(3, 1, heads=2, group=3)
    result = attend(pool, query, (1, 1, 1), window)
    for row in range(3):
        np.testing.assert_allclose(result[row], pool.expected(row, query[row], window), atol=2e-6, rtol=2e-5)


def test_rows_without_queries_give_zeros_and_do_not_disturb_others() -> None:
    lengths = (0, 11, 0, 5)
    pool = Pool(lengths, heads=2, dtype=DTYPES[1])
    query = queries(4, 2, heads=2, group=2)
    result = attend(pool, query, (0, 2, 0, 2))
    assert not result[[0, 2]].any()
    for row in (1, 3):
        np.testing.assert_allclose(result[row], pool.expected(row, query[row], None), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_step_of_padding_alone_gives_zeros(window: int | None) -> None:
    pool = Pool((0, 0), heads=1, dtype=DTYPES[1])
    assert not attend(pool, queries(2, 1, heads=1, group=1), (0, 0), window).any()


def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch() -> None:
    together = Pool((9, 32, 1), heads=2, dtype=DTYPES[1])
    query = queries(3, 1, heads=2, group=2)
    among_others = attend(together, query, (1, 1, 1))
    silent = attend(together, query, (1, 0, 0))
    np.testing.assert_array_equal(among_others[0], silent[0])


def test_the_result_has_the_querys_dtype_and_is_accumulated_in_float32() -> None:
    pool = Pool((30,), heads=1, dtype=DTYPES[1])
    query = queries(1, 1, heads=1, group=2, dtype=DTYPES[1])
    run = attention(pool.layout, pool.layer, None)
    result = run(query, pool.bits, pool.tables, np.array([29], np.int32), np.array([1], np.int32))
    assert result.dtype == jnp.bfloat16
    expected = pool.expected(0, query[0], None).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(np.asarray(result[0], np.float32), expected, rtol=2**-7)


def test_scores_far_apart_do_not_overflow() -> None:
    pool = Pool((30,), heads=1, dtype=DTYPES[0])
    query = 1e4 * queries(1, 1, heads=1, group=1)
    result = attend(pool, query, (1,))
    np.testing.assert_allclose(result[0], pool.expected(0, query[0], None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_write_lands_in_its_place_and_nowhere_else(dtype: np.dtype[Any]) -> None:
    layout = make_layout(3, dtype)
    before = jnp.asarray(np.full((6, 1), 7).repeat(LAYERS * 2 * 3 * BLOCK * DIM, 1), storage_dtype(dtype))
    rng = np.random.default_rng(1)
    key, value = rng.normal(size=(2, 3, 3, DIM)).astype(np.float32).astype(dtype)
    blocks, offsets = np.array([5, 0, 5], np.int32), np.array([0, BLOCK - 1, 2], np.int32)
    after = np.asarray(write_kv(before, 1, jnp.asarray(key), jnp.asarray(value), blocks, offsets, layout))
    expected = np.asarray(before).reshape(6, *layout.block_shape).copy()
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        expected[block, 1, 0, :, offset] = key[token].view(expected.dtype)
        expected[block, 1, 1, :, offset] = value[token].view(expected.dtype)
    np.testing.assert_array_equal(after, expected.reshape(6, -1))


def test_writes_beyond_the_pool_are_dropped() -> None:
    layout = make_layout(1, DTYPES[1])
    before = jnp.asarray(np.random.default_rng(0).integers(0, 2**16, (4, LAYERS * 2 * BLOCK * DIM)), jnp.uint16)
    new = jnp.ones((3, 1, DIM), jnp.bfloat16)
    blocks, offsets = np.array([4, 2**31 - 1, 4], np.int32), np.array([0, 1, 3], np.int32)
    np.testing.assert_array_equal(write_kv(before, 0, new, new, blocks, offsets, layout), before)


def test_float32_values_are_rounded_to_the_pools_dtype() -> None:
    layout = make_layout(1, DTYPES[1])
    pool = jnp.zeros((1, LAYERS * 2 * BLOCK * DIM), jnp.uint16)
    value = jnp.full((1, 1, DIM), 1.0 + 2**-8 + 2**-10, jnp.float32)
    written = write_kv(pool, 0, value, value, np.array([0]), np.array([0]), layout)
    stored = np.asarray(written).view(ml_dtypes.bfloat16).reshape(layout.block_shape)[0, 0, 0, 0]
    np.testing.assert_array_equal(stored.astype(np.float32), np.full(DIM, 1.0 + 2**-7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_step_by_step_is_what_attention_reads(dtype: np.dtype[Any]) -> None:
    heads, step, length = 2, 3, 12  # steps end within, at and beyond a block's end
    layout = make_layout(heads, dtype)
    rng = np.random.default_rng(3)
    key, value = rng.normal(size=(2, length, heads, DIM)).astype(np.float32).astype(dtype)
    table = np.array([[9, 2, 5, 0, 0, 0, 0, 0]], np.int32)
    nan = np.full((NUM_BLOCKS, LAYERS * 2 * heads * BLOCK * DIM), np.nan, dtype).view(storage_dtype(dtype))
    pool = jnp.asarray(nan)
    write = jax.jit(lambda *arrays: write_kv(arrays[0], 0, *arrays[1:], layout))
    for positions in np.arange(length).reshape(-1, step):
        blocks, offsets = table[0, positions // BLOCK], positions % BLOCK
        pool = write(pool, key[positions], value[positions], blocks, offsets)
    query = queries(1, 1, heads, group=2)
    result = attention(layout, 0, None)(query, pool, table, np.array([length - 1]), np.array([1]))
    expected = dense_attention(query[0], key, value, None)
    np.testing.assert_allclose(np.asarray(result)[0], expected, atol=2e-6, rtol=2e-5)
