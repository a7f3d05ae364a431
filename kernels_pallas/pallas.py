"""Paged attention and KV writes as Pallas kernels for NVIDIA GPUs, by way of Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.attend import RowShape, attend_kernel
from kernels_pallas.combine import combine_kernel
from kernels_pallas.interface import AttentionOptions, KVLayout, QueryRuns
from kernels_pallas.tuning import Tuning, tuning_for
from kernels_pallas.work import divide
from kernels_pallas.write import TILE_TOKENS, write_kernel

_WRITE_PARAMS = plgpu.CompilerParams(num_warps=1, num_stages=1)


@dataclass(frozen=True)
class PallasBackend:
    """The backend of kernels; see :class:`~kernels_pallas.AttentionBackend`.

    Attributes:
        chip: the device's kind, by which kernels are tuned.
        interpret: run by Pallas' interpreter, on CPU: slow, for tests and for debugging.
        tuning: in place of the table's; for measurements.
    """

    chip: str
    interpret: bool = False
    tuning: Tuning | None = None

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
        capped = options.soft_cap is not None
        tuning = self.tuning or tuning_for(self.chip, layout, query.shape[3], query.shape[1], soft_cap=capped)
        return _attend(query, pool, _array(layer), runs, sinks, layout, options, tuning, self.interpret)

    def write_kv(
        self, pool: Array, layer: int, key: Array, value: Array, blocks: Array, offsets: Array, layout: KVLayout
    ) -> Array:
        return _write(pool, _array(layer), key, value, blocks, offsets, layout, self.interpret)


def _array(layer: int) -> Array:
    """The layer as an argument, so that all layers of a model share one kernel, lowered and compiled once."""
    return jnp.full((1,), layer, jnp.int32)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _attend(
    query: Array,
    pool: Array,
    layer: Array,
    runs: QueryRuns,
    sinks: Array | None,
    layout: KVLayout,
    options: AttentionOptions,
    tuning: Tuning,
    interpret: bool,
) -> Array:
    num_runs, count, heads, group, dim = query.shape
    sizes = tuning.sizes(count, group, heads)
    work = divide(runs, count, sizes, options.window)
    rows = RowShape(sizes.block_queries, group)
    places = query.reshape(num_runs * count, heads, group, dim)
    view = layout.view(_reinterpreted(pool, layout.dtype))
    slots = (sizes.max_slots, heads, rows.used)
    out = jax.ShapeDtypeStruct(places.shape, places.dtype)
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = partial(attend_kernel, layout=layout, rows=rows, tile=sizes.tile_tokens, options=options)
    result, *partials = pl.pallas_call(
        _without_sinks(kernel, 5) if sinks is None else kernel,
        grid=(heads, work.items.shape[0]),
        out_shape=(out, floats((*slots, dim)), floats(slots), floats(slots)),
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="paged_attention",
    )(work.items, layer, places, view, runs.tables, *_given(sinks))
    combine = partial(combine_kernel, group=group, head_dim=dim)
    arguments = (work.cuts, *partials, *_given(sinks), result)
    result = pl.pallas_call(
        _without_sinks(combine, 4) if sinks is None else combine,
        grid=(rows.used, heads, sizes.target_items),
        out_shape=out,
        input_output_aliases={len(arguments) - 1: 0},
        # One warp of a head_dim of 256 would spill registers.
        compiler_params=plgpu.CompilerParams(num_warps=2 if dim > 128 else 1, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(*arguments)
    counted = jnp.arange(count) < runs.lengths[:, None]
    return jnp.where(counted[:, :, None, None, None], result.reshape(query.shape), 0)


@partial(jax.jit, static_argnums=(6, 7))
def _write(
    pool: Array,
    layer: Array,
    key: Array,
    value: Array,
    blocks: Array,
    offsets: Array,
    layout: KVLayout,
    interpret: bool,
) -> Array:
    tokens, heads, dim = key.shape
    view = layout.view(pool)
    bits = (_reinterpreted(each.astype(layout.dtype), pool.dtype) for each in (key, value))
    kernel = partial(write_kernel, tokens=tokens, num_blocks=pool.shape[0], head_dim=dim)
    written = pl.pallas_call(
        kernel,
        grid=(heads, pl.cdiv(tokens, TILE_TOKENS)),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        input_output_aliases={5: 0},
        compiler_params=_WRITE_PARAMS,
        interpret=interpret,
        name="write_kv",
    )(layer, *bits, blocks, offsets, view)
    return written.reshape(pool.shape)


def _without_sinks(kernel: Callable[..., None], index: int) -> Callable[..., None]:
    """The kernel for calls that have no argument ``index``, the sinks."""

    def run(*refs: Any) -> None:
        kernel(*refs[:index], None, *refs[index:])

    return run


def _given(sinks: Array | None) -> tuple[Array, ...]:
    return () if sinks is None else (sinks.astype(jnp.float32),)


def _reinterpreted(array: Array, dtype: jnp.dtype) -> Array:
    """The bits as another type of the same size: of a whole pool a bitcast on GPU, no copy."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
