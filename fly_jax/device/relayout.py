"""The device program that moves KV between head splits: gather slabs, exchange them, scatter them, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from fly_jax.device.device_arrays import BY_RANK
from fly_jax.device.step_upload import PackedLayout
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.kv.slabs import CHUNK_SLABS, HeadSplits, SlabMove
from fly_jax.models.sharding import TP_AXIS


def exchange_layout(ranks: int, slots: int) -> PackedLayout:
    """One rank's upload: what it sends to and receives from each rank, and whose latest token of each slot holds."""
    lanes = (ranks, CHUNK_SLABS)
    return PackedLayout(
        (
            ("send_blocks", lanes),
            ("send_parts", lanes),
            ("receive_blocks", lanes),
            ("receive_parts", lanes),
            ("token_ranks", (slots,)),
        )
    )


def relayout(spec: KVCacheSpec, splits: HeadSplits, slots: int, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """``(pool, token_table, packed) -> (pool, token_table)``, both donated.

    All reads of a launch come before its writes, so a block that it reads may not be one that it writes; whoever
    plans launches frees a source block only for later ones.
    """
    source_axes, target_axes = _slab_axes(spec, splits.source_tp, splits), _slab_axes(spec, splits.target_tp, splits)

    def rank_step(pool: Array, token_table: Array, packed: Array) -> tuple[Array, Array]:
        inputs = exchange_layout(mesh.size, slots).unpack(packed[0])
        slabs = _read(pool, source_axes, inputs["send_blocks"], inputs["send_parts"])
        slabs = lax.all_to_all(slabs, TP_AXIS, split_axis=0, concat_axis=0, tiled=True)
        pool = _write(pool, target_axes, inputs["receive_blocks"], inputs["receive_parts"], slabs)
        mine = inputs["token_ranks"] == lax.axis_index(TP_AXIS)
        tokens = lax.psum(jnp.where(mine, token_table[0], 0), TP_AXIS)
        return pool, jnp.where(inputs["token_ranks"] >= 0, tokens, token_table[0])[None]

    return jax.shard_map(
        rank_step,
        mesh=mesh,
        in_specs=(BY_RANK, BY_RANK, BY_RANK),
        out_specs=(BY_RANK, BY_RANK),
        check_vma=False,
    )


def pack_exchange(
    moves: Sequence[SlabMove], devices: Sequence[int], token_devices: Mapping[int, int], slots: int, num_blocks: int
) -> np.ndarray:
    """The upload of one launch, ``int32 [ranks, size]``.

    Args:
        moves: at most ``CHUNK_SLABS`` between any two devices.
        devices: the group's devices in rank order.
        token_devices: slot -> device whose latest sampled token of that slot holds.
        num_blocks: of a device's pool; lanes that carry nothing write to this block, which does not exist.
    """
    ranks, rank_of = len(devices), {device: rank for rank, device in enumerate(devices)}
    lanes = (ranks, ranks, CHUNK_SLABS)
    arrays = {name: np.zeros(lanes, np.int32) for name in ("send_blocks", "send_parts", "receive_parts")}
    arrays["receive_blocks"] = np.full(lanes, num_blocks, np.int32)
    filled: dict[tuple[int, int], int] = defaultdict(int)
    for move in moves:
        source, target = rank_of[move.source.device], rank_of[move.target.device]
        lane = filled[source, target]
        filled[source, target] += 1
        arrays["send_blocks"][source, target, lane] = move.source.block
        arrays["send_parts"][source, target, lane] = move.source.part
        arrays["receive_blocks"][target, source, lane] = move.target.block
        arrays["receive_parts"][target, source, lane] = move.target.part
    token_ranks = np.full(slots, -1, np.int32)
    for slot, device in token_devices.items():
        token_ranks[slot] = rank_of[device]
    return exchange_layout(ranks, slots).pack(ranks, {**arrays, "token_ranks": token_ranks})


class _SlabAxes:
    """A pool seen as slabs at one degree.

    Attributes:
        shape: of one block, ``[layers, 2, (head parts), heads, (token parts), tokens, head_dim]`` with one parts axis.
        axis: position of the parts axis in ``shape``.
    """

    def __init__(self, shape: tuple[int, ...], axis: int) -> None:
        self.shape, self.axis = shape, axis


def _slab_axes(spec: KVCacheSpec, tp: int, splits: HeadSplits) -> _SlabAxes:
    heads = min(spec.local_kv_heads(splits.source_tp), spec.local_kv_heads(splits.target_tp))
    tokens = min(spec.block_tokens(splits.source_tp), spec.block_tokens(splits.target_tp))
    head_parts, token_parts = spec.local_kv_heads(tp) // heads, spec.block_tokens(tp) // tokens
    if token_parts > 1:
        return _SlabAxes((spec.num_layers, 2, heads, token_parts, tokens, spec.head_dim), 3)
    return _SlabAxes((spec.num_layers, 2, head_parts, heads, tokens, spec.head_dim), 2)


def _read(pool: Array, axes: _SlabAxes, blocks: Array, parts: Array) -> Array:
    """Slabs ``[ranks, chunk, layers, 2, heads, tokens, head_dim]``."""
    view = pool.reshape(pool.shape[0], *axes.shape)
    if axes.axis == 3:
        return view[blocks, :, :, :, parts]
    return view[blocks, :, :, parts]


def _write(pool: Array, axes: _SlabAxes, blocks: Array, parts: Array, slabs: Array) -> Array:
    view = pool.reshape(pool.shape[0], *axes.shape)
    at = view.at[blocks, :, :, :, parts] if axes.axis == 3 else view.at[blocks, :, :, parts]
    return at.set(slabs, mode="drop").reshape(pool.shape)
