from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBackend, KVLayout, storage_dtype
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.xla import XLABackend
from tests.kernels_pallas.cases import BFLOAT16, FLOAT16, FLOAT32

BACKENDS = pytest.mark.parametrize(
    "backend", [XLABackend(), PallasBackend("cpu", interpret=True)], ids=["xla", "pallas"]
)
LAYERS, BLOCK = 2, 4


def make_layout(heads: int, dtype: np.dtype[Any], head_dim: int = 16) -> KVLayout:
    return KVLayout((LAYERS, 2, heads, BLOCK, head_dim), 1, jnp.dtype(dtype))


def random_pool(layout: KVLayout, num_blocks: int) -> np.ndarray:
    shape = (num_blocks, int(np.prod(layout.block_shape)))
    kind = storage_dtype(layout.dtype)
    return np.random.default_rng(0).integers(0, 100, shape).astype(kind)


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "head_dim", "tokens"), [(FLOAT32, 16, 3), (BFLOAT16, 80, 40), (FLOAT16, 16, 3)], ids=str
)
def test_a_write_lands_in_its_place_and_nowhere_else(
    backend: AttentionBackend, dtype: np.dtype[Any], head_dim: int, tokens: int
) -> None:
    heads = 3
    layout = make_layout(heads, dtype, head_dim)
    before = random_pool(layout, 17)
    rng = np.random.default_rng(1)
    key, value = rng.normal(size=(2, tokens, heads, head_dim)).astype(np.float32).astype(dtype)
    places = rng.permutation(17 * BLOCK)[:tokens]
    blocks, offsets = (places // BLOCK).astype(np.int32), (places % BLOCK).astype(np.int32)
    arrays = (jnp.asarray(each) for each in (key, value, blocks, offsets))
    after = np.asarray(backend.write_kv(jnp.asarray(before), 1, *arrays, layout))
    expected = before.reshape(17, *layout.block_shape).copy()
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        expected[block, 1, 0, :, offset] = key[token].view(expected.dtype)
        expected[block, 1, 1, :, offset] = value[token].view(expected.dtype)
    np.testing.assert_array_equal(after, expected.reshape(17, -1))


@BACKENDS
def test_writes_outside_the_pool_are_dropped(backend: AttentionBackend) -> None:
    layout = make_layout(1, BFLOAT16)
    before = random_pool(layout, 4)
    new = jnp.ones((3, 1, 16), jnp.bfloat16)
    blocks, offsets = jnp.array([4, 2**31 - 1, -1], jnp.int32), jnp.array([0, 1, 3], jnp.int32)
    np.testing.assert_array_equal(backend.write_kv(jnp.asarray(before), 0, new, new, blocks, offsets, layout), before)


@BACKENDS
def test_float32_values_are_rounded_to_the_pools_dtype(backend: AttentionBackend) -> None:
    layout = make_layout(1, BFLOAT16)
    pool = jnp.zeros((1, LAYERS * 2 * BLOCK * 16), jnp.uint16)
    value = jnp.full((1, 1, 16), 1.0 + 2**-8 + 2**-10, jnp.float32)
    place = jnp.zeros(1, jnp.int32)
    written = backend.write_kv(pool, 0, value, value, place, place, layout)
    stored = np.asarray(written).view(BFLOAT16).reshape(layout.block_shape)[0, 0, 0, 0]
    np.testing.assert_array_equal(stored.astype(np.float32), np.full(16, 1.0 + 2**-7))
