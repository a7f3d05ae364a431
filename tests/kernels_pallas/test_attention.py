from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import AttentionBackend, AttentionOptions
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.xla import XLABackend
from tests.kernels_pallas.cases import CASES, SMALL, TOLERANCE, Case
from tests.kernels_pallas.contexts import PagedContexts, Run, random_queries, relative_error

XLA = XLABackend()
INTERPRETED = PallasBackend("cpu", interpret=True, tuning=SMALL)
BACKENDS = pytest.mark.parametrize("backend", [XLA, INTERPRETED], ids=["xla", "pallas"])
OPTIONS = AttentionOptions(0.25)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_equals_attention_by_its_definition(case: Case) -> None:
    assert case.error(XLA) < TOLERANCE[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_equal_attention_by_its_definition(case: Case) -> None:
    assert case.error(PallasBackend("NVIDIA H200", interpret=True, tuning=case.tuning)) < TOLERANCE[case.dtype]


def small_contexts(*lengths: int, dtype: type = ml_dtypes.bfloat16) -> PagedContexts:
    return PagedContexts(lengths, heads=2, head_dim=16, block_tokens=4, dtype=dtype)


@pytest.mark.slow
@BACKENDS
def test_a_context_of_thousands(backend: AttentionBackend) -> None:
    contexts = PagedContexts([5000, 3], heads=1, head_dim=64, block_tokens=16, dtype=np.float32)
    runs = [Run(0, 4999, 1), Run(1, 2, 1)]
    query = random_queries(2, 1, contexts, group=4)
    error = relative_error(contexts.attend(backend, query, runs, OPTIONS), contexts.expected(query, runs, OPTIONS))
    assert error < 1e-5


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize("window", [None, 3])
def test_a_step_of_padding_alone_gives_zeros(backend: AttentionBackend, window: int | None) -> None:
    contexts = small_contexts(1)
    query = random_queries(2, 2, contexts, group=2)
    result = contexts.attend(backend, query, [Run(0, 0, 0)] * 2, AttentionOptions(0.25, window))
    assert (result == 0).all()


@pytest.mark.slow
@BACKENDS
def test_padding_gives_zeros_and_does_not_disturb_others(backend: AttentionBackend) -> None:
    contexts = small_contexts(11, 5)
    runs = [Run(0, 0, 0), Run(0, 9, 2), Run(1, 0, 0), Run(1, 4, 1)]
    query = random_queries(4, 2, contexts, group=2)
    result = contexts.attend(backend, query, runs, OPTIONS)
    assert (result[[0, 2]] == 0).all()
    assert (result[3, 1] == 0).all()
    assert relative_error(result, contexts.expected(query, runs, OPTIONS)) < 5e-3


def test_a_row_gets_the_same_bits_from_xla_whatever_else_is_in_the_batch() -> None:
    contexts = small_contexts(9, 32, 1)
    query = random_queries(3, 1, contexts, group=2)
    alone = contexts.attend(XLA, query, [Run(0, 8, 1), Run(0, 0, 0), Run(0, 0, 0)], OPTIONS)
    among_others = contexts.attend(XLA, query, [Run(0, 8, 1), Run(1, 31, 1), Run(2, 0, 1)], OPTIONS)
    np.testing.assert_array_equal(alone[0], among_others[0])


@pytest.mark.slow
@BACKENDS
def test_results_are_accumulated_in_float32_and_rounded_once(backend: AttentionBackend) -> None:
    contexts = small_contexts(600)
    runs = [Run(0, 599, 1)]
    query = random_queries(1, 1, contexts, group=2)
    result = contexts.attend(backend, query, runs, OPTIONS)
    # Two roundings to 8 bits: the weights, as operands of a bf16 product, and the result. Sums in bf16 would lose more.
    assert relative_error(result, contexts.expected(query, runs, OPTIONS)) < 2**-8


@pytest.mark.slow
@BACKENDS
def test_scores_far_apart_do_not_overflow(backend: AttentionBackend) -> None:
    contexts = small_contexts(200, dtype=np.float32)
    query = 1e4 * random_queries(1, 1, contexts, group=1)
    runs = [Run(0, 199, 1)]
    result = contexts.attend(backend, query, runs, OPTIONS)
    np.testing.assert_allclose(result, contexts.expected(query, runs, OPTIONS), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@BACKENDS
def test_a_sink_of_minus_infinity_is_none_and_a_huge_one_takes_everything(backend: AttentionBackend) -> None:
    contexts = small_contexts(70, dtype=np.float32)
    query, runs = random_queries(1, 1, contexts, group=2), [Run(0, 69, 1)]
    plain = contexts.attend(backend, query, runs, OPTIONS)
    no_sink = contexts.attend(backend, query, runs, OPTIONS, np.full((2, 2), -np.inf, np.float32))
    np.testing.assert_allclose(no_sink, plain, rtol=1e-5, atol=1e-6)
    all_sink = contexts.attend(backend, query, runs, OPTIONS, np.full((2, 2), 1e4, np.float32))
    assert (all_sink == 0).all()


@BACKENDS
def test_what_is_written_step_by_step_is_what_attention_reads(backend: AttentionBackend) -> None:
    contexts = PagedContexts([12], heads=2, head_dim=16, block_tokens=4, dtype=ml_dtypes.bfloat16)
    keys, values = contexts.contexts[0]
    pool = jnp.full(contexts.bits.shape, 0x7FC0, jnp.uint16)  # NaN
    for positions in np.arange(12).reshape(-1, 3):  # steps end within, at and beyond a block's end
        blocks, offsets = contexts.tables[0, positions // 4], positions % 4
        new = (jnp.asarray(each[positions]) for each in (keys, values))
        pool = backend.write_kv(pool, 1, *new, jnp.asarray(blocks), jnp.asarray(offsets), contexts.layout)
    np.testing.assert_array_equal(pool, contexts.bits)
