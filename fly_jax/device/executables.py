"""Every program that serving can need, compiled and run once before the first request."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fly_jax.device import programs as steps
from fly_jax.device.device_arrays import BY_RANK
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.packing import StepShapes
from fly_jax.device.relayout import exchange_layout, relayout
from fly_jax.device.step_upload import chunk_blocks, sampling_layout, scoring_layout
from fly_jax.errors import CompileError
from fly_jax.layout import DeviceGroup
from fly_jax.models.sharding import ModelSpec, ModuleSpec
from fly_jax.scheduling.launch import ExecutableKey, StepKind
from kernels_pallas import KVLayout, attention_backend, storage_dtype

# jax's own name of the event, through its public monitoring interface.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


_REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class ProgramShapes(StepShapes):
    """The sizes and kinds that all programs of one engine agree on.

    Attributes:
        attention_backend: one of ``kernels_pallas.BACKENDS``.
    """

    model: ModelSpec
    dtype: jnp.dtype
    attention_backend: str

    def kv_layout(self, tp: int) -> KVLayout:
        return KVLayout(self.kv.block_shape(tp), chunk_blocks(self.kv, tp), self.dtype)


class ProgramLowerer:
    """Lowers one key's program for its group's mesh, from shapes alone."""

    def __init__(self, shapes: ProgramShapes, meshes: DeviceMeshes) -> None:
        self.shapes, self.meshes = shapes, meshes
        self.attention = attention_backend(shapes.attention_backend, meshes.devices[0])

    def lower(self, key: ExecutableKey) -> jax.stages.Lowered:
        mesh, model = self.meshes.mesh(key.group), self.shapes.model
        arguments = self.arguments(key)
        if key.kind is StepKind.HEAD:
            return jax.jit(steps.head(model, key.bucket, mesh), donate_argnums=2).lower(*arguments)
        if key.kind is StepKind.SCORE:
            return jax.jit(steps.score(model, key.bucket, mesh)).lower(*arguments)
        if key.splits is not None:
            move = relayout(self.shapes.kv, key.splits, self.shapes.slots, mesh)
            return jax.jit(move, donate_argnums=(0, 1)).lower(*arguments)
        attention = steps.PagedPool(self.attention, self.shapes.kv_layout(key.group.tp))
        program = steps.backbone(model, attention, self.shapes.backbone(key), mesh)
        return jax.jit(program, donate_argnums=1).lower(*arguments)

    def arguments(self, key: ExecutableKey) -> tuple[Any, ...]:
        """Shapes, dtypes and shardings of the program's arguments."""
        shapes, group = self.shapes, key.group
        hidden_size = shapes.model.config.hidden_size
        tables = self._struct(group, (group.num_devices, shapes.slots), jnp.int32, BY_RANK)
        if key.kind is StepKind.HEAD:
            hidden = self._struct(group, (shapes.sample_rows(group.tp), hidden_size), shapes.dtype)
            packed = self._struct(group, (1, sampling_layout(key.bucket).size), jnp.int32)
            return self._leaves(group, shapes.model.head), hidden, tables, packed
        if key.kind is StepKind.SCORE:
            hidden = self._struct(group, (key.bucket, hidden_size), shapes.dtype)
            return (
                self._leaves(group, shapes.model.head),
                hidden,
                self._struct(group, (1, scoring_layout(key.bucket).size), jnp.int32),
            )
        pool_shape = (group.num_devices * shapes.kv.num_blocks, shapes.kv.block_elements)
        pool = self._struct(group, pool_shape, storage_dtype(shapes.dtype), BY_RANK)
        if key.kind is StepKind.RELAYOUT:
            size = exchange_layout(group.num_devices, shapes.slots).size
            return pool, tables, self._struct(group, (group.num_devices, size), jnp.int32, BY_RANK)
        packed = self._struct(group, (group.num_devices, shapes.backbone(key).layout.size), jnp.int32, BY_RANK)
        return self._leaves(group, shapes.model.decoder), pool, tables, packed

    def _leaves(self, group: DeviceGroup, module: ModuleSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(self._struct(group, p.shape, p.dtype, p.partition) for p in module.parameters)

    def _struct(
        self, group: DeviceGroup, shape: tuple[int, ...], dtype: Any, partition: PartitionSpec = _REPLICATED
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.meshes.sharding(group, partition))


@dataclass
class ExecutableTable:
    """Compiled programs by key, called directly: a wrong shape or sharding is an error, never a silent recompile.

    Attributes:
        step_seconds: measured at warm-up; what a layout policy plans with.
        compile_seconds: wall time of lowering and compiling everything.
    """

    programs: dict[ExecutableKey, jax.stages.Compiled]
    compile_seconds: float
    step_seconds: dict[ExecutableKey, float] = field(default_factory=dict)

    def __getitem__(self, key: ExecutableKey) -> jax.stages.Compiled:
        return self.programs[key]

    def __len__(self) -> int:
        return len(self.programs)


def compile_all(
    lowerer: ProgramLowerer,
    keys: list[ExecutableKey],
    *,
    workers: int,
    optimization_level: int | None,
    progress: Callable[[int, int], None],
) -> ExecutableTable:
    """Lowers in this thread and compiles in several.

    Raises:
        CompileError: naming the first program that failed.
    """
    started = time.perf_counter()
    options: dict[str, Any] = {}
    if optimization_level is not None:
        options["xla_backend_optimization_level"] = optimization_level
    programs: dict[ExecutableKey, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="compile") as pool:
        futures = {}
        for key in keys:
            futures[key] = pool.submit(_compile, key, _lower(lowerer, key), options)
        for done, (key, future) in enumerate(futures.items(), start=1):
            programs[key] = future.result()
            progress(done, len(keys))
    return ExecutableTable(programs, time.perf_counter() - started)


def _lower(lowerer: ProgramLowerer, key: ExecutableKey) -> jax.stages.Lowered:
    try:
        return lowerer.lower(key)
    except Exception as error:
        raise CompileError(f"lowering {key} failed: {type(error).__name__}: {error}") from error


def _compile(key: ExecutableKey, lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options)
    except Exception as error:
        raise CompileError(f"compiling {key} failed: {type(error).__name__}: {error}") from error


class CompileCounter:
    """Counts backend compiles in this process, through ``jax.monitoring``."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG002  the listener's shape
        if event == _COMPILE_EVENT:
            self.count += 1
