"""Timing of device programs, and the two rates that kernels are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_SAMPLES = 5


def seconds_per_call(
    run: Callable[..., Any],
    arguments: tuple[Any, ...],
    budget_seconds: float,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """Median over samples that fill the budget, each of as many calls as fit; the first call does not count.

    Calls are launched one behind another and only the last is waited for, so a launch costs nothing where it takes
    less time than the device takes for a call. A call that takes the whole budget is timed once.

    Args:
        wait: for the result of a call, and so of those before it.
    """
    wait(run(*arguments))
    once = _sample(run, arguments, 1, wait)
    if once > budget_seconds:
        return once
    calls = max(1, int(budget_seconds / _SAMPLES / max(once, 1e-6)))
    return statistics.median(_sample(run, arguments, calls, wait) / calls for _ in range(_SAMPLES))


def _sample(run: Callable[..., Any], arguments: tuple[Any, ...], calls: int, wait: Callable[[Any], Any]) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        result = run(*arguments)
    wait(result)
    return time.perf_counter() - started


def copy_bytes_per_second(size: int, budget_seconds: float) -> float:
    """Bytes read and written by a second of copying ``size`` bytes on the device."""
    source = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)  # constants let a GPU clock higher
    copy = jax.jit(lambda x: x.copy())
    return 2 * size / seconds_per_call(copy, (source,), budget_seconds)


def matmul_flops_per_second(width: int, dtype: Any, budget_seconds: float) -> float:
    """Of a square matrix product."""
    left, right = (jax.random.normal(jax.random.key(seed), (width, width), dtype) for seed in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * width**3 / seconds_per_call(product, (left, right), budget_seconds)
