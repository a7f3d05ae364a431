"""What an attention backend is: two functions of arrays, and the types that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class KVLayout:
    """How a program sees one device's pool.

    Attributes:
        block_shape: ``(layers, 2, kv_heads, block_tokens, head_dim)`` of one block.
        chunk_blocks: blocks that one iteration of the XLA backend's loop reads; tables are whole chunks wide.
        dtype: what the stored bits mean.
    """

    block_shape: tuple[int, int, int, int, int]
    chunk_blocks: int
    dtype: jnp.dtype

    @property
    def kv_heads(self) -> int:
        return self.block_shape[2]

    @property
    def block_tokens(self) -> int:
        return self.block_shape[3]

    @property
    def head_dim(self) -> int:
        return self.block_shape[4]

    def view(self, pool: Array) -> Array:
        """``[num_blocks, elements]`` -> ``[num_blocks, *block_shape]``: a bitcast."""
        return pool.reshape(pool.shape[0], *self.block_shape)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What the pool's elements are stored as: two-byte ones as uint16 bits.

    A bf16 scatter on CPU makes XLA convert the whole pool to float32 and back at every step.
    """
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QueryRuns:
    """Which request and which of its positions the queries of a call are.

    A run is up to as many successive positions of one request as the query array has places for it.

    Attributes:
        tables: block tables, int32 ``[requests, table_blocks]``.
        rows: each run's row of ``tables``, int32 ``[runs]``.
        starts: position of each run's first query, int32 ``[runs]``.
        lengths: queries that count, int32 ``[runs]``; those behind them are padding.
    """

    tables: Array
    rows: Array
    starts: Array
    lengths: Array


@dataclass(frozen=True)
class AttentionOptions:
    """What is the same for every query of a layer.

    Attributes:
        scale: factor on the scores.
        window: latest positions that a query sees, its own included; None: all.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; None: they stay.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class AttentionBackend(Protocol):
    """Attention over paged KV memory: two functions of arrays, called while a program is traced."""

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
        """Causal attention of runs of queries, each over its own request's paged context.

        Args:
            query: ``[runs, queries, kv_heads, group, head_dim]``: successive positions of one request a run. Kernels
                round it to the pool's dtype.
            pool: ``[num_blocks, elements]``, as :func:`~kernels_pallas.storage_dtype` keeps them.
            layer: whose keys and values are read.
            sinks: ``[kv_heads, group]``, a score without a value that every query sees besides its context
                (transformers ``GptOssAttention.sinks``); None: there is none.

        Returns:
            Like ``query``, in its dtype; accumulated in float32. Padding gives zeros. Nothing that lies outside a
            request's own positions is read into a result.
        """
        ...

    def write_kv(
        self, pool: Array, layer: int, key: Array, value: Array, blocks: Array, offsets: Array, layout: KVLayout
    ) -> Array:
        """Writes one layer's new keys and values in place.

        Args:
            pool: ``[num_blocks, elements]``, donated by the caller.
            key, value: ``[tokens, kv_heads, head_dim]``.
            blocks: int32 ``[tokens]``; a number outside the pool writes nothing. No two tokens share a place.
            offsets: int32 ``[tokens]``: place inside the block.

        Returns:
            The pool.
        """
        ...
