"""Everything about an engine that is decided before a byte of weights is read: sizes, layouts, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from checkpoints import PreparedInfo, prepared_info, read_model
from fly_jax.config import EngineConfig
from fly_jax.device.executables import ProgramShapes
from fly_jax.engine.served import ServedModel
from fly_jax.errors import CheckpointError, ConfigError, ModelTooLargeError
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout, all_groups, max_tp_degree
from fly_jax.models.config import ModelConfig
from fly_jax.models.generation_config import eos_token_ids, read_sampling_defaults
from fly_jax.models.sharding import ModelSpec, model_spec
from fly_jax.platform import host_memory_bytes, start_devices
from fly_jax.sampling_params import SamplingDefaults
from fly_jax.scheduling.step import SchedulerLimits
from fly_jax.text.tokenizer import Tokenizer, placeholder_tokenizer
from kernels_pallas import default_backend

_log = logging.getLogger(__name__)

# Without an accelerator's memory to fill, the pools hold this many full contexts a device, within a share of the host.
CPU_FULL_CONTEXTS = 8
CPU_KV_SHARE = 0.25


@dataclass(frozen=True)
class EnginePlan:
    """What an engine will be.

    Attributes:
        devices: in device order.
        base_tp: smallest TP degree that holds the model.
        layout: the first layout.
        groups: those to compile programs for; a layout of others cannot be switched to.
        shapes: sizes of all programs, of the model and of the KV pools.
    """

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    sampling_defaults: SamplingDefaults
    devices: tuple[jax.Device, ...]
    base_tp: int
    layout: Layout
    groups: tuple[DeviceGroup, ...]
    shapes: ProgramShapes

    @property
    def max_model_len(self) -> int:
        return self.shapes.max_model_len

    @property
    def served(self) -> ServedModel:
        vocab_size = self.model_config.vocab_size
        return ServedModel(self.tokenizer, self.eos_token_ids, vocab_size, self.max_model_len, self.sampling_defaults)


def plan_engine(config: EngineConfig) -> EnginePlan:
    """Reads the folder's configuration and checks that everything fits.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError: one line that says what to do.
    """
    folder = config.model
    # Dummy weights need config.json alone, so there may be no file to tell the truth of.
    model_config = ModelConfig.from_folder(folder) if config.load_format == "dummy" else read_model(folder)
    defaults = read_sampling_defaults(config.generation_config, config.override_generation_config, folder)
    tokenizer = _tokenizer(config, folder, model_config)
    devices = _devices(config)
    spec = _model_spec(config, folder, model_config, len(devices))
    if spec.dtype == jnp.float16 and devices[0].platform == "cpu":
        _log.warning(
            "float16 on CPU: every product converts its weights to float32; --dtype bfloat16 is less exact, "
            "and several times as fast where the CPU has instructions for it"
        )
    memory = _device_memory(config, devices)
    base_tp = _base_tp(config, spec, memory, len(devices))
    layout, groups = _layouts(config, len(devices), base_tp)
    max_model_len = _max_model_len(config, model_config)
    kv_spec = _kv_spec(config, spec, max_model_len, memory, base_tp, devices)
    shapes = ProgramShapes(
        model=spec,
        kv=kv_spec,
        dtype=spec.dtype,
        max_model_len=max_model_len,
        limits=SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens),
        num_devices=len(devices),
        base_tp=base_tp,
        attention_backend=_attention_backend(config, devices),
    )
    eos = eos_token_ids(config.generation_config, folder, tokenizer.eos_token_id)
    return EnginePlan(config, model_config, tokenizer, eos, defaults, devices, base_tp, layout, groups, shapes)


def _tokenizer(config: EngineConfig, folder: Path, model: ModelConfig) -> Tokenizer:
    """The folder's; dummy weights need no more than ``config.json``, so bytes stand for text where there is none."""
    if config.load_format == "dummy" and not Tokenizer.is_in(folder):
        return placeholder_tokenizer(model.vocab_size)
    return Tokenizer.of_folder(folder)


def _devices(config: EngineConfig) -> tuple[jax.Device, ...]:
    present = start_devices()
    count = config.devices or len(present)
    if count > len(present):
        raise ConfigError(f"{count} devices asked for but {len(present)} are present: lower --devices")
    return tuple(present[:count])


def _attention_backend(config: EngineConfig, devices: tuple[jax.Device, ...]) -> str:
    return default_backend(devices[0]) if config.attention_backend == "auto" else config.attention_backend


def _model_spec(config: EngineConfig, folder: Path, model: ModelConfig, num_devices: int) -> ModelSpec:
    prepared = None if config.load_format == "dummy" else prepared_info(folder)
    stored = prepared.dtype if prepared is not None else model.dtype
    dtype = stored if config.dtype == "auto" else config.dtype
    return model_spec(model, _max_tp(folder, prepared, num_devices), jnp.dtype(dtype))


def _max_tp(folder: Path, prepared: PreparedInfo | None, num_devices: int) -> int:
    needed = max_tp_degree(num_devices)
    if prepared is None:
        return needed
    if prepared.max_tp < needed:
        raise CheckpointError(
            f"{folder} was converted for TP up to {prepared.max_tp} but {num_devices} devices need {needed}: "
            f"convert again with --max-tp {needed} or lower --devices"
        )
    return prepared.max_tp


def _device_memory(config: EngineConfig, devices: tuple[jax.Device, ...]) -> int:
    """Bytes one device may use for weights and KV."""
    if config.device_memory_bytes is not None:
        return config.device_memory_bytes
    if devices[0].platform == "cpu":
        return host_memory_bytes()  # virtual devices share it, and alias one copy of the weights
    stats = devices[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0) * config.gpu_memory_utilization)


def _base_tp(config: EngineConfig, spec: ModelSpec, memory: int, num_devices: int) -> int:
    """The degree asked for, or the smallest at which the weights fit a device."""
    widest = max_tp_degree(num_devices)
    asked = config.base_tp
    if asked is not None and (asked & (asked - 1) or asked > widest):
        raise ConfigError(f"base_tp {asked} is not a power of two up to the {num_devices} devices: choose one")
    base_tp = asked or 1
    while weight_bytes(spec, base_tp) > memory:
        if asked is not None or base_tp == widest:
            raise ModelTooLargeError(
                f"{config.model} needs {weight_bytes(spec, base_tp):,} bytes of weights a device at TP {base_tp} "
                f"but a device has {memory:,}: use more devices, more memory or --dtype bfloat16"
            )
        base_tp *= 2
    return base_tp


def weight_bytes(spec: ModelSpec, base_tp: int) -> int:
    """Resident weight bytes of one device."""
    sharded_buffers = {p.buffer for p in (*spec.decoder.parameters, *spec.head.parameters) if p.sharded}
    replicated = {p.buffer for p in spec.decoder.parameters if not p.sharded}
    return sum(
        parameter.nbytes // (base_tp if name in sharded_buffers - replicated else 1)
        for name, parameter in spec.buffers.items()
    )


def _layouts(config: EngineConfig, num_devices: int, base_tp: int) -> tuple[Layout, tuple[DeviceGroup, ...]]:
    """The first layout, and the groups of all layouts that may follow."""
    first = config.layout or (config.layouts[0] if config.layouts else f"tp{base_tp}")
    layout = Layout.parse(first, num_devices, base_tp)
    if config.layouts is None:
        return layout, all_groups(num_devices, base_tp)
    allowed = [layout, *(Layout.parse(text, num_devices, base_tp) for text in config.layouts)]
    return layout, tuple(
        sorted({group for each in allowed for group in each.groups}, key=lambda g: (g.num_devices, g.start))
    )


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    own = model.max_position_embeddings
    if model.rope.kind in ("linear", "dynamic"):
        own = int(own * model.rope.option("factor"))
    elif model.rope.kind == "yarn":  # some configs name the context before scaling here, some the one after
        own = max(own, int(model.rope.original_max_positions * model.rope.option("factor")))
    if config.max_model_len is not None and config.max_model_len > own:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's own context of {own}: lower it")
    return config.max_model_len or own


def with_kept_free(plan: EnginePlan, kept_free: int) -> EnginePlan:
    """The same plan with KV pools that leave this many bytes of a device to running programs.

    Raises:
        ModelTooLargeError: the blocks that were asked for do not fit then, or none does.
    """
    shapes, config = plan.shapes, plan.config
    memory = _device_memory(config, plan.devices)
    kv = _kv_spec(config, shapes.model, shapes.max_model_len, memory, plan.base_tp, plan.devices, kept_free)
    return replace(plan, shapes=replace(shapes, kv=kv))


def _kv_spec(
    config: EngineConfig,
    spec: ModelSpec,
    max_model_len: int,
    memory: int,
    base_tp: int,
    devices: tuple[jax.Device, ...],
    kept_free: int = 0,
) -> KVCacheSpec:
    model, part = spec.config, spec.partition
    itemsize = spec.dtype.itemsize
    one = KVCacheSpec(1, config.block_size, model.num_layers, part.kv_heads, model.head_dim, itemsize)
    weights, wanted = weight_bytes(spec, base_tp), config.num_blocks
    if wanted is None and devices[0].platform == "cpu":
        share = int((memory - weights - kept_free) * CPU_KV_SHARE) // (one.block_bytes * len(devices))
        wanted = min(CPU_FULL_CONTEXTS * one.blocks_for(max_model_len, 1), share)
    return replace(one, num_blocks=fitting_blocks(wanted, one.block_bytes, memory, weights, kept_free))


def fitting_blocks(wanted: int | None, block_bytes: int, memory: int, weights: int, kept_free: int) -> int:
    """KV blocks of one device: as many as wanted; None: all that fit.

    Args:
        block_bytes, memory, weights: of one device.
        kept_free: bytes of it that running programs need.

    Raises:
        ModelTooLargeError: they do not fit, or not one does.
    """
    free = memory - weights - kept_free
    num_blocks = max(1, free // block_bytes) if wanted is None else wanted
    if num_blocks * block_bytes > free or num_blocks < 1:
        raise ModelTooLargeError(
            f"{num_blocks} KV blocks of {block_bytes:,} bytes do not fit the {max(0, free):,} that the weights and the "
            f"{kept_free:,} kept free for programs leave of a device's {memory:,}: use more memory, a higher TP or "
            f"fewer blocks"
        )
    return num_blocks
