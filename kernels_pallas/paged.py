"""Paged attention and KV writes in plain JAX: the CPU path, and the oracle of accelerator kernels.

The pool is one array of blocks, seen as ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``. Where its
elements are two bytes it is stored as uint16 bits: a bf16 scatter on CPU makes XLA convert the whole pool to
float32 and back at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

_MASKED = -1e30


@dataclass(frozen=True)
class KVLayout:
    """How a program sees one device's pool.

    Attributes:
        block_shape: ``(layers, 2, kv_heads, block_tokens, head_dim)`` of one block.
        chunk_blocks: blocks that one iteration of the attention loop reads.
        dtype: what the stored bits mean.
    """

    block_shape: tuple[int, int, int, int, int]
    chunk_blocks: int
    dtype: jnp.dtype

    @property
    def block_tokens(self) -> int:
        return self.block_shape[3]

    def view(self, pool: Array) -> Array:
        """``[num_blocks, elements]`` -> ``[num_blocks, *block_shape]``: a bitcast."""
        return pool.reshape(pool.shape[0], *self.block_shape)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What the pool's elements are stored as."""
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def write_kv(
    pool: Array, layer: int, key: Array, value: Array, blocks: Array, offsets: Array, layout: KVLayout
) -> Array:
    """Writes one layer's new keys and values in place.

    Args:
        pool: ``[num_blocks, elements]`` bits, donated by the caller.
        key, value: ``[tokens, kv_heads, head_dim]``.
        blocks: int32 ``[tokens]``; a number beyond the pool writes nothing.
        offsets: int32 ``[tokens]``: place inside the block.

    Returns:
        The pool.
    """
    rows = jnp.stack([key, value], axis=1).astype(layout.dtype)
    if pool.dtype != layout.dtype:
        rows = lax.bitcast_convert_type(rows, pool.dtype)
    written = layout.view(pool).at[blocks, layer, :, :, offsets].set(rows, mode="drop")
    return written.reshape(pool.shape)


def paged_attention(
    query: Array,
    pool: Array,
    layer: int,
    tables: Array,
    starts: Array,
    lengths: Array,
    layout: KVLayout,
    *,
    scale: float,
    window: int | None = None,
) -> Array:
    """Causal attention of runs of queries, each over its own request's paged context.

    Work is proportional to the longest context present: the loop over chunks of context has a dynamic bound,
    and starts at the first chunk that any sliding window reaches.

    Args:
        query: ``[runs, queries, kv_heads, group, head_dim]``: successive positions of one request a run.
        pool: ``[num_blocks, elements]`` bits.
        tables: int32 ``[runs, table_blocks]``, a whole number of chunks wide.
        starts: int32 ``[runs]``: position of the run's first query.
        lengths: int32 ``[runs]``: queries that count; a run of 0 gives zeros.
        scale: factor on the scores.
        window: latest positions that a query sees, its own included; None: all.

    Returns:
        Like ``query``, in its dtype; accumulated in float32.
    """
    runs, queries, heads, group, dim = query.shape
    chunk = layout.chunk_blocks * layout.block_tokens
    view = layout.view(pool)
    scaled = query.astype(jnp.float32) * scale
    positions = starts[:, None] + jnp.arange(queries)
    ends = jnp.where(lengths > 0, starts + lengths, 0)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, best, mass = carry
        key, value = _read_chunk(view, layer, tables, index, layout)
        places = index * chunk + jnp.arange(chunk)
        seen = (places <= positions[:, :, None]) & (places < ends[:, None, None])
        if window is not None:
            seen &= places > positions[:, :, None] - window
        scores = jnp.einsum("rqhgd,rhtd->rhgqt", scaled, key, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        value = jnp.where((places < ends[:, None])[:, None, :, None], value, 0)
        top = jnp.maximum(best, scores.max(axis=-1))
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - top[..., None]), 0.0)
        decay = jnp.exp(best - top)
        update = jnp.einsum("rhgqt,rhtd->rhgqd", weights, value, preferred_element_type=jnp.float32)
        return total * decay[..., None] + update, top, mass * decay + weights.sum(axis=-1)

    first = jnp.int32(0)
    if window is not None:
        first = jnp.min(jnp.where(lengths > 0, jnp.maximum(starts - window + 1, 0), jnp.iinfo(jnp.int32).max)) // chunk
    last = (jnp.max(ends) + chunk - 1) // chunk
    shape = (runs, heads, group, queries)
    empty = (
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    total, _, mass = lax.fori_loop(first, last, step, empty)
    result = total / jnp.maximum(mass, 1e-30)[..., None]
    return jnp.moveaxis(result, 3, 1).astype(query.dtype)


def _read_chunk(view: Array, layer: int, tables: Array, index: Array, layout: KVLayout) -> tuple[Array, Array]:
    """Keys and values of one chunk of every run, each float32 ``[runs, kv_heads, chunk, head_dim]``."""
    _, _, heads, tokens, dim = layout.block_shape
    blocks = lax.dynamic_slice_in_dim(tables, index * layout.chunk_blocks, layout.chunk_blocks, axis=1)
    chunk = view[blocks, layer]
    if chunk.dtype != layout.dtype:
        chunk = lax.bitcast_convert_type(chunk, layout.dtype)
    chunk = jnp.moveaxis(chunk, 1, 3).reshape(blocks.shape[0], 2, heads, layout.chunk_blocks * tokens, dim)
    return chunk[:, 0].astype(jnp.float32), chunk[:, 1].astype(jnp.float32)
