"""Paged attention and KV writes in plain JAX: the CPU path, and the oracle of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.interface import AttentionOptions, KVLayout, QueryRuns

_MASKED = -1e30


class XLABackend:
    """The backend of plain JAX; see :class:`~kernels_pallas.AttentionBackend`."""

    def paged_attention(
        self,
        query: Array,
        pool: Array,
        layer: int,
        runs: QueryRuns,
        layout: KVLayout,
        options: AttentionOptions,
        sinks: Array | None = None,
    ) -> Array:
        return _attend(query, _ContextReader(pool, layer, runs.tables[runs.rows], layout), runs, options, sinks)

    def write_kv(
        self, pool: Array, layer: int, key: Array, value: Array, blocks: Array, offsets: Array, layout: KVLayout
    ) -> Array:
        rows = jnp.stack([key, value], axis=1).astype(layout.dtype)
        if pool.dtype != layout.dtype:
            rows = lax.bitcast_convert_type(rows, pool.dtype)
        blocks = jnp.where(blocks < 0, pool.shape[0], blocks)  # an index below 0 would count from the end
        written = layout.view(pool).at[blocks, layer, :, :, offsets].set(rows, mode="drop")
        return written.reshape(pool.shape)


@dataclass(frozen=True)
class _ContextReader:
    """Reads every run's context, chunk by chunk.

    Attributes:
        tables: each run's block table, int32 ``[runs, table_blocks]``.
    """

    pool: Array
    layer: int
    tables: Array
    layout: KVLayout

    @property
    def chunk(self) -> int:
        """Positions of a chunk."""
        return self.layout.chunk_blocks * self.layout.block_tokens

    def read(self, index: Array) -> tuple[Array, Array]:
        """Keys and values of one chunk of every run, each float32 ``[runs, kv_heads, chunk, head_dim]``."""
        layout = self.layout
        blocks = lax.dynamic_slice_in_dim(self.tables, index * layout.chunk_blocks, layout.chunk_blocks, axis=1)
        chunk = layout.view(self.pool)[blocks, self.layer]
        if chunk.dtype != layout.dtype:
            chunk = lax.bitcast_convert_type(chunk, layout.dtype)
        shape = (blocks.shape[0], 2, layout.kv_heads, self.chunk, layout.head_dim)
        chunk = jnp.moveaxis(chunk, 1, 3).reshape(shape)
        return chunk[:, 0].astype(jnp.float32), chunk[:, 1].astype(jnp.float32)


def _attend(
    query: Array, context: _ContextReader, runs: QueryRuns, options: AttentionOptions, sinks: Array | None
) -> Array:
    """Online softmax over chunks of context.

    Work is proportional to the longest context present: the loop has a dynamic bound, and starts at the first chunk
    that any sliding window reaches. Tables are a whole number of chunks wide.
    """
    num_runs, queries, heads, group, dim = query.shape
    chunk = context.chunk
    # A GPU would round float32 operands to TF32.
    exact = lax.Precision.HIGHEST if context.layout.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    scaled = query.astype(jnp.float32) * options.scale
    counted = jnp.arange(queries) < runs.lengths[:, None]
    # Padding sees nothing.
    positions = jnp.where(counted, runs.starts[:, None] + jnp.arange(queries), -1)
    ends = jnp.where(runs.lengths > 0, runs.starts + runs.lengths, 0)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, best, mass = carry
        key, value = context.read(index)
        places = index * chunk + jnp.arange(chunk)
        seen = (places <= positions[:, :, None]) & (places < ends[:, None, None])
        if options.window is not None:
            seen &= places > positions[:, :, None] - options.window
        scores = product("rqhgd,rhtd->rhgqt", scaled, key)
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        value = jnp.where((places < ends[:, None])[:, None, :, None], value, 0)
        top = jnp.maximum(best, scores.max(axis=-1))
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - top[..., None]), 0.0)
        decay = jnp.exp(best - top)
        update = product("rhgqt,rhtd->rhgqd", weights, value)
        return total * decay[..., None] + update, top, mass * decay + weights.sum(axis=-1)

    shape = (num_runs, heads, group, queries)
    # An attention sink is a score without a value: the maximum and the mass begin with it.
    sink = None if sinks is None else jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None], shape)
    empty = (
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32) if sink is None else sink,
        jnp.zeros(shape, jnp.float32) if sink is None else jnp.ones(shape, jnp.float32),
    )
    total, _, mass = lax.fori_loop(*_chunks(runs, ends, chunk, options.window), step, empty)
    result = total / jnp.maximum(mass, 1e-30)[..., None]
    return jnp.moveaxis(result, 3, 1).astype(query.dtype)


def _chunks(runs: QueryRuns, ends: Array, chunk: int, window: int | None) -> tuple[Array, Array]:
    """First chunk of context that any run reads, and one beyond the last."""
    first = jnp.int32(0)
    if window is not None:
        begins = jnp.where(runs.lengths > 0, jnp.maximum(runs.starts - window + 1, 0), jnp.iinfo(jnp.int32).max)
        first = jnp.min(begins) // chunk
    return first, (jnp.max(ends) + chunk - 1) // chunk
