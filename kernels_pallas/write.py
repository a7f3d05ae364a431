"""The kernel that writes new keys and values into the pool, in place."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attend import columns, pieces

# Tokens that one program writes for one head.
TILE_TOKENS = 16


def write_kernel(
    layer_ref: Any,
    key: Any,
    value: Any,
    blocks: Any,
    offsets: Any,
    _before: Any,
    pool: Any,
    *,
    tokens: int,
    num_blocks: int,
    head_dim: int,
) -> None:
    """Grid ``(kv_heads, token tiles)``.

    Args:
        layer_ref: int32 ``[1]``.
        key, value: ``[tokens, kv_heads, head_dim]`` in the pool's storage type.
        blocks, offsets: int32 ``[tokens]``; a block outside the pool writes nothing.
        pool: ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``, in place of the argument before it.
    """
    head, layer = pl.program_id(0), layer_ref[0]
    token = pl.program_id(1) * TILE_TOKENS + jnp.arange(TILE_TOKENS, dtype=jnp.int32)
    present = token < tokens
    block = plgpu.load(blocks.at[token], mask=present, other=num_blocks)
    offset = plgpu.load(offsets.at[token], mask=present, other=0)
    writes = (block >= 0) & (block < num_blocks)
    for which, source in enumerate((key, value)):
        for piece in pieces(head_dim):
            column = columns(piece)[None, :]
            rows = plgpu.load(source.at[token[:, None], head, column], mask=present[:, None], other=0)
            where = (block[:, None], layer, which, head, offset[:, None], column)
            plgpu.store(pool.at[where], rows, mask=writes[:, None])
