"""The kernel that combines the partial results of query blocks whose context was cut into items."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attend import FIRST_MAXIMUM, columns, finish, pieces
from kernels_pallas.work import Cut

# Partial results that one iteration takes together.
CHUNK_SLOTS = 16


def combine_kernel(
    cuts: Any,
    partial_sum: Any,
    partial_max: Any,
    partial_mass: Any,
    sinks: Any,
    _before: Any,
    out: Any,
    *,
    group: int,
    head_dim: int,
) -> None:
    """Grid ``(queries * group, kv_heads, cuts)``: one row of one cut block's result a program.

    Args:
        cuts: int32 ``[cuts, len(Cut)]``.
        partial_sum: float32 ``[slots, kv_heads, queries * group, head_dim]``.
        partial_max, partial_mass: float32 ``[slots, kv_heads, queries * group]``.
        sinks: float32 ``[kv_heads, group]``, or None.
        out: ``[places, kv_heads, group, head_dim]``, in place of the argument before it.
    """
    row, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    query, member = row // group, row % group
    slots = cuts[index, Cut.SLOTS]

    @pl.when((slots > 0) & (query < cuts[index, Cut.COUNT]))
    def _() -> None:
        first = cuts[index, Cut.FIRST_SLOT]
        parts = pieces(head_dim)

        def step(chunk: Array, carry: tuple[tuple[Array, ...], Array, Array]) -> Any:
            sums, best, mass = carry
            number = chunk * CHUNK_SLOTS + jnp.arange(CHUNK_SLOTS, dtype=jnp.int32)
            inside = number < slots
            maxima = plgpu.load(partial_max.at[first + number, head, row], mask=inside, other=FIRST_MAXIMUM)
            masses = plgpu.load(partial_mass.at[first + number, head, row], mask=inside, other=0.0)
            top = jnp.maximum(best, jnp.max(maxima))
            weights, decay = jnp.exp2(maxima - top), jnp.exp2(best - top)
            updated = []
            for piece, total in zip(parts, sums, strict=True):
                where = ((first + number)[:, None], head, row, columns(piece)[None, :])
                values = plgpu.load(partial_sum.at[where], mask=inside[:, None], other=0.0)
                updated.append(total * decay + jnp.sum(values * weights[:, None], axis=0))
            return tuple(updated), top, mass * decay + jnp.sum(masses * weights)

        empty = (
            tuple(jnp.zeros((piece.stop - piece.start,), jnp.float32) for piece in parts),
            jnp.float32(FIRST_MAXIMUM),
            jnp.float32(0.0),
        )
        chunks = (slots + CHUNK_SLOTS - 1) // CHUNK_SLOTS
        sums, best, mass = lax.fori_loop(0, chunks, step, empty)
        scaled, total = finish(sums, best, mass, None if sinks is None else sinks[head, member])
        place = cuts[index, Cut.PLACE] + query
        for piece, values in zip(parts, scaled, strict=True):
            plgpu.store(out.at[place, head, member, columns(piece)], (values / total).astype(out.dtype))
