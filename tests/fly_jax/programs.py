"""Programs of a model with the widths of an 8B Llama, compiled from shapes alone: no weights exist."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fly_jax.device.executables import ProgramLowerer, ProgramShapes
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.relayout import CHUNK_SLABS
from fly_jax.inspection import ProgramReport
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.kv.slabs import HeadSplits
from fly_jax.layout import DeviceGroup
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import ParameterSpec, model_spec
from fly_jax.scheduling.launch import ExecutableKey, StepKind
from fly_jax.scheduling.step import SchedulerLimits

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
NUM_BLOCKS = 1237  # no other array has this many rows


def shapes_of_8b(num_layers: int, max_tp: int, attention_backend: str = "xla") -> ProgramShapes:
    config = ModelConfig.from_hf({**LLAMA_8B, "num_hidden_layers": num_layers})
    spec = model_spec(config, max_tp, jnp.dtype("bfloat16"))
    kv = KVCacheSpec(NUM_BLOCKS, 16, num_layers, spec.partition.kv_heads, config.head_dim, 2)
    return ProgramShapes(
        model=spec, kv=kv, dtype=jnp.dtype("bfloat16"), max_model_len=8192, limits=SchedulerLimits(8, 128),
        num_devices=max_tp, base_tp=1, attention_backend=attention_backend,
    )  # fmt: skip


def check_no_weight_copies(report: ProgramReport, parameters: Sequence[ParameterSpec], tp: int) -> None:
    for parameter in parameters:
        if len(parameter.shape) == 2:
            rows = parameter.shape[0] // (tp if parameter.sharded else 1)
            assert report.new_arrays_shaped((rows, parameter.shape[1])) == [], parameter.name


def check_head_copies_no_weight(shapes: ProgramShapes, devices: Sequence[jax.Device], tp: int, kind: StepKind) -> None:
    """Compiles a head or score program and asserts that it makes no array of the vocabulary projection's shape."""
    bucket = shapes.buckets(tp).rows[-1] if kind is StepKind.HEAD else shapes.buckets(tp).tokens[-1]
    key = ExecutableKey(DeviceGroup(0, tp), kind, bucket)
    compiled = ProgramLowerer(shapes, DeviceMeshes(devices, base_tp=1)).lower(key).compile()
    check_no_weight_copies(ProgramReport.of(compiled), shapes.model.head.parameters, tp)


def check_in_place(shapes: ProgramShapes, devices: Sequence[jax.Device], tp: int, kind: StepKind) -> ProgramReport:
    """Compiles one backbone and asserts that it aliases the pool, copies no weight and has two all-reduces a layer."""
    meshes = DeviceMeshes(devices, base_tp=1)
    bucket = shapes.buckets(tp).rows[0] if kind is StepKind.DECODE else shapes.buckets(tp).tokens[-1]
    key = ExecutableKey(DeviceGroup(0, tp), kind, bucket)
    report = ProgramReport.of(ProgramLowerer(shapes, meshes).lower(key).compile())
    layers = shapes.model.config.num_layers
    assert report.all_reduces == (0 if tp == 1 else 2 * layers)
    assert report.aliased_bytes == shapes.kv.num_blocks * shapes.kv.block_bytes
    assert report.new_arrays(shapes.kv.num_blocks * shapes.kv.block_elements) == []
    check_no_weight_copies(report, shapes.model.decoder.parameters, tp)
    return report


def check_relayout_in_place(shapes: ProgramShapes, devices: Sequence[jax.Device], splits: HeadSplits) -> ProgramReport:
    """Compiles one relayout and asserts that it aliases the pool and the token table and makes no other pool."""
    group = DeviceGroup(0, max(splits.source_tp, splits.target_tp))
    key = ExecutableKey(group, StepKind.RELAYOUT, CHUNK_SLABS, splits)
    report = ProgramReport.of(ProgramLowerer(shapes, DeviceMeshes(devices, base_tp=1)).lower(key).compile())
    token_table_bytes = 4 * shapes.slots
    assert report.aliased_bytes == shapes.kv.num_blocks * shapes.kv.block_bytes + token_table_bytes
    assert report.new_arrays(shapes.kv.num_blocks * shapes.kv.block_elements) == []
    return report
