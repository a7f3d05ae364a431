"""The tests of CASES again on a real GPU, where kernels are compiled and not interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBackend, AttentionOptions, KVLayout, QueryRuns, attention_backend
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.tuning import Tuning
from tests.kernels_pallas.cases import CASES, LONG_CASES, TILE_QUERIES, TOLERANCE, Case
from tests.kernels_pallas.contexts import PagedContexts, Run, random_queries, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax sees no GPU here"),
]


def kernels(tuning: Tuning | None = None) -> AttentionBackend:
    return PallasBackend(jax.devices()[0].device_kind, tuning=tuning)


# A GPU may be at hand for minutes only: what serves today's models comes first.
IN_ORDER = sorted(
    [*LONG_CASES, *CASES], key=lambda case: (case.tuning is not None, case.head_dim != 128, case.degree > 1)
)


@pytest.mark.parametrize("case", IN_ORDER, ids=str)
def test_the_kernels_equal_attention_by_its_definition(case: Case) -> None:
    """In the case's sizes, which cut contexts into many items, and in the table's."""
    assert case.error(kernels(case.tuning)) < TOLERANCE[case.dtype]
    assert case.error(kernels()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_equals_attention_by_its_definition(case: Case) -> None:
    assert case.error(attention_backend("xla", jax.devices()[0])) < TOLERANCE[case.dtype]


def test_the_kernels_give_the_same_bits_every_time() -> None:
    contexts = PagedContexts([3000, 70], heads=2, head_dim=128, block_tokens=16, dtype=jnp.bfloat16)
    runs = [Run(0, 2999 - TILE_QUERIES, TILE_QUERIES), Run(1, 50, 9)]
    query = random_queries(2, TILE_QUERIES, contexts, group=4)
    first, *others = (contexts.attend(kernels(), query, runs, AttentionOptions(0.1)) for _ in range(5))
    assert relative_error(first, contexts.expected(query, runs, AttentionOptions(0.1))) < 5e-3
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_blocks_beyond_two_billion_elements_are_found() -> None:
    layout = KVLayout((32, 2, 8, 16, 128), 8, jnp.dtype(jnp.bfloat16))
    elements = int(np.prod(layout.block_shape))
    num_blocks = 2**32 // elements + 2
    stats = jax.devices()[0].memory_stats() or {}
    if 3 * num_blocks * elements > stats.get("bytes_limit", 0):
        pytest.skip("the GPU is too small for a pool of 2^32 elements")
    last = jnp.array([num_blocks - 1], jnp.int32)
    key, value = (jnp.full((1, 8, 128), each, jnp.bfloat16) for each in (1.0, 3.0))
    pool = jnp.zeros((num_blocks, elements), jnp.uint16)
    write = jax.jit(
        lambda pool, *rows: kernels().write_kv(pool, 31, *rows, last, jnp.zeros(1, jnp.int32), layout), donate_argnums=0
    )
    pool = write(pool, key, value)
    assert int(pool[num_blocks - 1, -1 - 15 * 128]) == 0x4040  # 3 in bf16: the last head's first token's last value
    assert not pool[0].any()
    runs = QueryRuns(last[:, None].repeat(8, 1), *(jnp.array([each], jnp.int32) for each in (0, 0, 1)))
    query = jnp.ones((1, 1, 8, 4, 128), jnp.bfloat16)
    result = kernels().paged_attention(query, pool, 31, runs, layout, AttentionOptions(0.1))
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.full(result.shape, 3.0, np.float32))
