"""Paged contexts with everything around them NaN, and attention over them by its definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels_pallas import AttentionBackend, AttentionOptions, KVLayout, QueryRuns, storage_dtype

LAYERS = 2
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Run:
    """``count`` successive positions of a request, from ``start`` on."""

    request: int
    start: int
    count: int


class PagedContexts:
    """A pool of NaN, in which some requests' contexts are written to blocks in random order.

    Attributes:
        lengths: of each request's context.
        tables: block tables, wider than needed; the entries behind a context name a block of NaN.
        bits: the pool as the backends take it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: Any,
        layer: int = 1,
        shared_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            layer: the only layer that is not NaN.
            shared_blocks: first blocks that all requests of at least so many blocks have in common.
        """
        rng = np.random.default_rng(seed)
        self.lengths, self.layer, self.dtype = tuple(lengths), layer, np.dtype(dtype)
        chunk_blocks = max(1, CHUNK_TOKENS // block_tokens)
        self.layout = KVLayout((LAYERS, 2, heads, block_tokens, head_dim), chunk_blocks, jnp.dtype(dtype))
        used = [-(-length // block_tokens) for length in lengths]
        num_blocks = sum(used) + 2
        order = iter(rng.permutation(num_blocks).tolist())
        unused = next(order)
        width = -(-(max(used) + 1) // chunk_blocks) * chunk_blocks
        self.tables = np.full((len(lengths), width), unused, np.int32)
        self.blocks = np.full((num_blocks, *self.layout.block_shape), np.nan, self.dtype)
        self.contexts: list[np.ndarray] = []
        for row, length in enumerate(lengths):
            own = rng.normal(size=(2, length, heads, head_dim)).astype(np.float32).astype(self.dtype)
            shared = shared_blocks if row and min(used[row], used[0]) > shared_blocks else 0
            if shared:
                own[:, : shared * block_tokens] = self.contexts[0][:, : shared * block_tokens]
            self.contexts.append(own)
            own_blocks = [next(order) for _ in range(used[row] - shared)]
            self.tables[row, : used[row]] = [*self.tables[0, :shared], *own_blocks]
            self._write(row, length)
        self.bits = jnp.asarray(self.blocks.reshape(num_blocks, -1).view(storage_dtype(self.layout.dtype)))

    def _write(self, row: int, length: int) -> None:
        size = self.layout.block_tokens
        for index, first in enumerate(range(0, length, size)):
            rows = self.contexts[row][:, first : first + size]
            block = self.blocks[self.tables[row, index], self.layer]
            block[:, :, : rows.shape[1]] = np.moveaxis(rows, 1, 2)

    def attend(
        self,
        backend: AttentionBackend,
        query: np.ndarray,
        runs: Sequence[Run],
        options: AttentionOptions,
        sinks: np.ndarray | None = None,
    ) -> np.ndarray:
        """``query [runs, queries, heads, group, head_dim]`` through a backend, as float32."""
        columns = np.array([(run.request, run.start, run.count) for run in runs], np.int32).T
        described = QueryRuns(jnp.asarray(self.tables), *(jnp.asarray(column) for column in columns))

        def run(query: Array, pool: Array, runs: QueryRuns, sinks: Array | None) -> Array:
            return backend.paged_attention(query, pool, self.layer, runs, self.layout, options, sinks)

        arguments = (jnp.asarray(query), self.bits, described, None if sinks is None else jnp.asarray(sinks))
        # Tests run each program once: compiling takes most of their time.
        fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        result = jax.jit(run).lower(*arguments).compile(compiler_options=fast)(*arguments)
        assert result.dtype == query.dtype
        return np.asarray(result.astype(jnp.float32))

    def expected(
        self, query: np.ndarray, runs: Sequence[Run], options: AttentionOptions, sinks: np.ndarray | None = None
    ) -> np.ndarray:
        """What :meth:`attend` should give, in float64."""
        out = np.zeros(query.shape)
        for index, run in enumerate(runs):
            if run.count:
                key, value = self.contexts[run.request][:, : run.start + run.count]
                out[index, : run.count] = dense_attention(query[index, : run.count], key, value, options, sinks)
        return out


def dense_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, options: AttentionOptions, sinks: np.ndarray | None
) -> np.ndarray:
    """The definition: ``query [queries, heads, group, head_dim]`` are the last positions of the context."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    positions = np.arange(len(key) - len(query), len(key))[:, None]
    places = np.arange(len(key))[None, :]
    seen = (places <= positions) & (places > positions - (options.window or len(key)))
    scores = np.einsum("qhgd,thd->hgqt", query, key) * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * np.tanh(scores / options.soft_cap)
    scores = np.where(seen, scores, -np.inf)
    sink = np.full((*scores.shape[:-1], 1), -np.inf)
    if sinks is not None:
        sink[:] = sinks.astype(np.float64)[:, :, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = np.exp(scores - top)
    mass = weights.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    return np.einsum("hgqt,thd->qhgd", weights / mass, value)


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """``|result - expected| / |expected|``; NaN anywhere makes it NaN."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def random_queries(runs: int, queries: int, contexts: PagedContexts, group: int, seed: int = 7) -> np.ndarray:
    """In the contexts' dtype: ``[runs, queries, heads, group, head_dim]``."""
    shape = (runs, queries, contexts.layout.kv_heads, group, contexts.layout.head_dim)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(contexts.dtype)
