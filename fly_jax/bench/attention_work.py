"""What ``bench kernels`` times: attention over random paged contexts, and others' over contiguous ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fly_jax.bench.timing import seconds_per_call
from fly_jax.device.step_upload import chunk_blocks
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.scheduling.step import TILE_TOKENS
from kernels_pallas import AttentionBackend, AttentionOptions, KVLayout, QueryRuns, storage_dtype

# Calls that follow one another in a program, each on another layer's KV, as in a step. What a program does once (it
# divides the work) is spread over fewer layers than a model has; KV of all layers that fits a cache stays there.
LAYERS = 8


@dataclass(frozen=True)
class Heads:
    """Of a model, at TP 1."""

    kv_heads: int
    group: int
    head_dim: int


@dataclass(frozen=True)
class Work:
    """One call of one device of a TP group.

    Attributes:
        tp: degree; the device holds ``kv_heads / tp`` heads, in blocks of ``block_size * tp`` tokens.
        batch: requests.
        context: tokens of each, the new ones included.
        queries: new tokens of each; 1 is a decode.
    """

    heads: Heads
    tp: int
    block_size: int
    batch: int
    context: int
    queries: int
    dtype: Any = jnp.bfloat16

    def __str__(self) -> str:
        return f"TP {self.tp}, batch {self.batch}, context {self.context:,}, {self.queries:,} new tokens each"

    @property
    def spec(self) -> KVCacheSpec:
        heads, itemsize = self.heads, jnp.dtype(self.dtype).itemsize
        return KVCacheSpec(self.num_blocks, self.block_size, LAYERS, heads.kv_heads, heads.head_dim, itemsize)

    @property
    def blocks_each(self) -> int:
        return -(-self.context // (self.block_size * self.tp))

    @property
    def num_blocks(self) -> int:
        return self.batch * self.blocks_each

    @property
    def local_heads(self) -> int:
        return self.heads.kv_heads // self.tp

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.spec.block_bytes

    @property
    def bytes_read(self) -> int:
        """Keys and values that a call cannot avoid reading."""
        row = 2 * self.local_heads * self.heads.head_dim * jnp.dtype(self.dtype).itemsize
        return self.batch * self.context * row

    @property
    def flops(self) -> int:
        """Of the two products over what a causal mask leaves."""
        first = self.context - self.queries
        pairs = self.queries * first + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.local_heads * self.heads.group * self.heads.head_dim * pairs

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(self.heads.head_dim**-0.5)

    def layout(self) -> KVLayout:
        return KVLayout(self.spec.block_shape(self.tp), chunk_blocks(self.spec, self.tp), jnp.dtype(self.dtype))

    def query(self, key: Array) -> Array:
        """``[runs, queries, kv_heads, group, head_dim]``."""
        shape = (*self._runs_shape, self.local_heads, self.heads.group, self.heads.head_dim)
        return jax.random.normal(key, shape, jnp.dtype(self.dtype))

    @property
    def _runs_shape(self) -> tuple[int, int]:
        if self.queries == 1:
            return self.batch, 1
        return self.batch * -(-self.queries // TILE_TOKENS), TILE_TOKENS

    def runs(self) -> QueryRuns:
        """Every request's blocks lie scattered over the whole pool."""
        num_runs, per_run = self._runs_shape
        order = np.random.default_rng(0).permutation(self.num_blocks).reshape(self.batch, self.blocks_each)
        whole = chunk_blocks(self.spec, self.tp)
        tables = np.zeros((self.batch, -(-self.blocks_each // whole) * whole), np.int32)
        tables[:, : self.blocks_each] = order
        rows = np.repeat(np.arange(self.batch), num_runs // self.batch)
        first = np.tile(np.arange(num_runs // self.batch) * per_run, self.batch)
        lengths = np.minimum(per_run, self.queries - first)
        starts = self.context - self.queries + first
        return QueryRuns(*(jnp.asarray(each, jnp.int32) for each in (tables, rows, starts, lengths)))


def compile_paged(work: Work, backend: AttentionBackend, pool: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """A call of a backend on each layer; threads may compile several at once.

    Args:
        pool: ``[blocks, elements]``.
    """
    layout = work.layout()

    def step(query: Array, pool: Array, runs: QueryRuns) -> Array:
        for layer in range(LAYERS):
            query = backend.paged_attention(query, pool, layer, runs, layout, work.options)
        return query

    query = jax.eval_shape(work.query, jax.random.key(1))
    return jax.jit(step).lower(query, pool, work.runs()).compile()


def time_paged(work: Work, compiled: jax.stages.Compiled, pool: Array, budget_seconds: float) -> float:
    """Seconds of one call of a backend over the first blocks of a pool, ``pool [blocks, elements]``."""
    arguments = (work.query(jax.random.key(1)), pool, work.runs())
    return seconds_per_call(compiled, arguments, budget_seconds) / LAYERS


def random_pool(num_blocks: int, spec: KVCacheSpec, dtype: Any) -> Array:
    """A pool of normal values: ``[num_blocks, elements]``. Constant ones would let a GPU run at higher clocks."""

    @jax.jit
    def make() -> Array:
        values = jax.random.normal(jax.random.key(0), (num_blocks, spec.block_elements), jnp.dtype(dtype))
        return values if values.dtype.itemsize != 2 else lax.bitcast_convert_type(values, storage_dtype(values.dtype))

    return jax.block_until_ready(make())


def time_jax_contiguous(work: Work, budget_seconds: float) -> float | None:
    """Seconds of ``jax.nn.dot_product_attention`` on contiguous keys and values; None where it cannot be compared."""
    if work.queries not in (1, work.context):
        return None
    query, layers = _contiguous(work)
    implementation: Literal["cudnn", "xla"] = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def step(query: Array, layers: list[tuple[Array, Array]]) -> Array:
        for key, value in layers:
            query = jax.nn.dot_product_attention(
                query, key, value, scale=work.options.scale, is_causal=work.queries > 1, implementation=implementation
            )
        return query

    return seconds_per_call(jax.jit(step), (query, layers), budget_seconds) / LAYERS


def _contiguous(work: Work) -> tuple[Array, list[tuple[Array, Array]]]:
    """A query, and keys and values of each layer."""
    heads, dim, dtype = work.local_heads, work.heads.head_dim, jnp.dtype(work.dtype)
    keys = iter(jax.random.split(jax.random.key(2), 1 + 2 * LAYERS))
    query = jax.random.normal(next(keys), (work.batch, work.queries, heads * work.heads.group, dim), dtype)
    shape = (work.batch, work.context, heads, dim)
    return query, [
        (jax.random.normal(next(keys), shape, dtype), jax.random.normal(next(keys), shape, dtype))
        for _ in range(LAYERS)
    ]


def torch_on_gpu() -> bool:
    """Whether PyTorch is installed and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch  # type: ignore[import-not-found, unused-ignore]

    return bool(torch.cuda.is_available())


def time_torch_sdpa(work: Work, budget_seconds: float) -> float | None:
    """Seconds of PyTorch's ``scaled_dot_product_attention`` on contiguous keys and values; None as above, and
    where PyTorch finds no memory beside jax's."""
    if work.queries not in (1, work.context):
        return None
    import torch

    try:
        return _time_torch_sdpa(work, budget_seconds)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()  # jax needs it for the next pool


def _time_torch_sdpa(work: Work, budget_seconds: float) -> float:
    import torch

    dtype = {2: torch.bfloat16, 4: torch.float32}[jnp.dtype(work.dtype).itemsize]
    heads, dim = work.local_heads, work.heads.head_dim
    query = torch.randn(work.batch, heads * work.heads.group, work.queries, dim, dtype=dtype, device="cuda")
    layers = [
        tuple(torch.randn(work.batch, heads, work.context, dim, dtype=dtype, device="cuda") for _ in range(2))
        for _ in range(LAYERS)
    ]
    attend: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    def step() -> None:
        out = query
        for key, value in layers:
            out = attend(out, key, value, is_causal=work.queries > 1, enable_gqa=True)

    return seconds_per_call(step, (), budget_seconds, wait=lambda _: torch.cuda.synchronize()) / LAYERS
