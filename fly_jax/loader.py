"""From a model folder and options to a model that is ready to serve: weights resident, every program compiled."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import load_weights, prepared_info
from fly_jax.buckets import Buckets
from fly_jax.config import EngineConfig
from fly_jax.device_groups import DeviceMeshes
from fly_jax.errors import CheckpointError, ConfigError, ModelTooLargeError
from fly_jax.executables import CompileCounter, ProgramLowerer, ProgramShapes, compile_all
from fly_jax.group_scheduler import SchedulerLimits
from fly_jax.kv_cache import KVCacheSpec
from fly_jax.kv_pool import KVPool
from fly_jax.layout import DeviceGroup, Layout, max_tp_degree
from fly_jax.models.config import ModelConfig, read_json
from fly_jax.models.sharding import ModelSpec, model_spec
from fly_jax.platform import cache_dir, host_memory_bytes
from fly_jax.runner import ModelRunner
from fly_jax.tokenizer import Tokenizer
from fly_jax.weights import WeightsManager
from kernels_pallas.paged import storage_dtype

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

# Without an accelerator's memory to fill, the pools hold this many full contexts a device, within a share of the host.
CPU_FULL_CONTEXTS = 8
CPU_KV_SHARE = 0.25


@dataclass(frozen=True)
class LoadedModel:
    """Everything an :class:`~fly_jax.engine.Engine` drives."""

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    base_tp: int
    kv_spec: KVCacheSpec
    limits: SchedulerLimits
    max_model_len: int
    initial_layout: Layout
    groups: tuple[DeviceGroup, ...]
    runner: ModelRunner
    compiles: CompileCounter

    @property
    def num_devices(self) -> int:
        return len(self.runner.meshes.devices)


def load_model(config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Loads, places, compiles and warms up.

    Args:
        progress: called with a phase (``loading``, ``compiling``, ``warming up``), what is done and the total.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError, CompileError: one line that says what to do.
    """
    report = progress or _report_nothing
    folder = _model_folder(config.model)
    model_config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer(folder)
    devices = _devices(config)
    dtype = jnp.dtype(model_config.serving_dtype(config.dtype))
    max_tp = _max_tp(folder, len(devices))
    spec = model_spec(model_config, max_tp, dtype)
    memory = _device_memory(config, devices)
    base_tp = config.base_tp or _smallest_base_tp(spec, memory, max_tp_degree(len(devices)), folder)
    layout = Layout.parse(config.layout or f"tp{base_tp}", len(devices), base_tp)
    max_model_len = _max_model_len(config, model_config)
    kv_spec = _kv_spec(config, spec, max_model_len, memory, base_tp, devices[0])
    limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
    meshes = DeviceMeshes(devices, base_tp)
    host = _load_host(folder, spec, dtype, base_tp, report)
    weights = WeightsManager(spec, meshes, host)
    pool = KVPool(kv_spec, meshes, storage_dtype(dtype))
    buckets = Buckets.of(config.max_num_seqs, limits.tile_budget)
    shapes = ProgramShapes(spec, kv_spec, buckets, dtype, max_model_len, slots=config.max_num_seqs + 1)
    compiles = CompileCounter()
    runner = _compile_and_warm_up(shapes, meshes, weights, pool, report)
    return LoadedModel(
        config, model_config, tokenizer, _eos_token_ids(folder), base_tp, kv_spec, limits, max_model_len,
        layout, meshes.groups, runner, compiles,
    )  # fmt: skip


def _report_nothing(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs."""
    folder = cache_dir() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _compile_and_warm_up(
    shapes: ProgramShapes, meshes: DeviceMeshes, weights: WeightsManager, pool: KVPool, report: Progress
) -> ModelRunner:
    enable_compilation_cache()
    keys = [key for group in meshes.groups for key in shapes.keys(group)]
    executables = compile_all(
        ProgramLowerer(shapes, meshes),
        keys,
        workers=os.cpu_count() or 1,
        progress=lambda done, total: report("compiling", done, total),
    )
    runner = ModelRunner(shapes, meshes, weights, pool, executables)
    runner.warm_up(lambda done, total: report("warming up", done, total))
    return runner


def _load_host(
    folder: Path, spec: ModelSpec, dtype: jnp.dtype, base_tp: int, report: Progress
) -> list[Mapping[str, np.ndarray]]:
    def load(shard: int) -> dict[str, np.ndarray]:
        return load_weights(
            folder, spec, dtype, base_shard=(shard, base_tp),
            progress=lambda done, total: report("loading", shard * total + done, base_tp * total),
        )  # fmt: skip

    return [load(shard) for shard in range(base_tp)]


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(
            f"model folder {path} does not exist: give a Hugging Face folder or one made by fly-jax convert"
        )
    return path


def _devices(config: EngineConfig) -> list[jax.Device]:
    present = jax.devices()
    count = config.devices or len(present)
    if count > len(present):
        raise ConfigError(f"{count} devices asked for but {len(present)} are present: lower --devices")
    return present[:count]


def _max_tp(folder: Path, num_devices: int) -> int:
    needed = max_tp_degree(num_devices)
    info = prepared_info(folder)
    if info is None:
        return needed
    if info.max_tp < needed:
        raise CheckpointError(
            f"{folder} was converted for TP up to {info.max_tp} but {num_devices} devices need {needed}: "
            f"convert again with --max-tp {needed} or lower --devices"
        )
    return info.max_tp


def _device_memory(config: EngineConfig, devices: list[jax.Device]) -> int:
    """Bytes one device may use for weights and KV."""
    if config.device_memory_bytes is not None:
        return config.device_memory_bytes
    if devices[0].platform == "cpu":
        return host_memory_bytes()  # virtual devices share it, and alias one copy of the weights
    stats = devices[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0) * config.gpu_memory_utilization)


def _smallest_base_tp(spec: ModelSpec, memory: int, widest: int, folder: Path) -> int:
    base_tp = 1
    while base_tp <= widest:
        if weight_bytes(spec, base_tp) <= memory:
            return base_tp
        base_tp *= 2
    raise ModelTooLargeError(
        f"{folder} needs {weight_bytes(spec, widest):,} bytes of weights a device at TP {widest} "
        f"but a device has {memory:,}: use more devices, more memory or --dtype bfloat16"
    )


def weight_bytes(spec: ModelSpec, base_tp: int) -> int:
    """Resident weight bytes of one device."""
    sharded_buffers = {p.buffer for p in (*spec.decoder.parameters, *spec.head.parameters) if p.sharded}
    replicated = {p.buffer for p in spec.decoder.parameters if not p.sharded}
    return sum(
        parameter.nbytes // (base_tp if name in sharded_buffers - replicated else 1)
        for name, parameter in spec.buffers.items()
    )


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    own = model.max_position_embeddings
    if model.rope.kind in ("linear", "dynamic"):
        own = int(own * model.rope.option("factor"))
    if config.max_model_len is not None and config.max_model_len > own:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's own context of {own}: lower it")
    return config.max_model_len or own


def _kv_spec(
    config: EngineConfig, spec: ModelSpec, max_model_len: int, memory: int, base_tp: int, device: jax.Device
) -> KVCacheSpec:
    model, part = spec.config, spec.partition
    itemsize = jnp.dtype(spec.buffers["embedding"].dtype).itemsize
    one = KVCacheSpec(1, config.block_size, model.num_layers, part.kv_heads, model.head_dim, itemsize)
    free = memory - weight_bytes(spec, base_tp)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif device.platform == "cpu":
        wanted = CPU_FULL_CONTEXTS * one.blocks_for(max_model_len, 1)
        share = int(free * CPU_KV_SHARE) // (one.block_bytes * (config.devices or 1))
        num_blocks = min(wanted, share)
    else:
        num_blocks = free // one.block_bytes
    if num_blocks * one.block_bytes > free or num_blocks < 1:
        raise ModelTooLargeError(
            f"{num_blocks} KV blocks of {one.block_bytes:,} bytes do not fit the {max(0, free):,} that the weights "
            f"leave of a device's {memory:,}: use more memory, a higher TP or fewer blocks"
        )
    return KVCacheSpec(num_blocks, config.block_size, model.num_layers, part.kv_heads, model.head_dim, itemsize)


def _eos_token_ids(folder: Path) -> frozenset[int]:
    """From generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
