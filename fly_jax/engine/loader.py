"""From options to a model that is ready to serve: weights resident, every program compiled and run once."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from checkpoints import load_weights
from fly_jax.config import EngineConfig
from fly_jax.device.device_arrays import DeviceArrays
from fly_jax.device.dummy_weights import draw_resident
from fly_jax.device.executables import CompileCounter, ExecutableTable, ProgramLowerer, compile_all
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.program_memory import largest_keys, working_bytes
from fly_jax.device.runner import ModelRunner
from fly_jax.device.weights import WeightsManager
from fly_jax.engine.engine import Engine
from fly_jax.engine.plan import EnginePlan, plan_engine, with_kept_free
from fly_jax.engine.step_times import step_times_of
from fly_jax.platform import cache_dir
from fly_jax.policy.observation import Machine
from fly_jax.scheduling.launch import ExecutableKey
from kernels_pallas import storage_dtype

# Told of a phase, what of it is done and how much there is.
ReportProgress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to serve."""

    plan: EnginePlan
    runner: ModelRunner

    def engine(self) -> Engine:
        """A new engine over the runner, which one engine at a time may drive."""
        plan = self.plan
        machine = Machine(
            num_devices=len(plan.devices),
            base_tp=plan.base_tp,
            groups=frozenset(plan.groups),
            kv=plan.shapes.kv,
            limits=plan.shapes.limits,
            step_times=step_times_of(self.runner.info.step_seconds),
        )
        return Engine(plan.config, plan.served, machine, plan.layout, self.runner)


def load_model(config: EngineConfig, progress: ReportProgress | None = None) -> LoadedModel:
    """Plans, loads, compiles and warms up.

    Args:
        progress: called with a phase (``measuring`` on accelerators, ``loading``, ``compiling``, ``warming up``), what
            is done and the total.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError, CompileError: one line that says what to do.
    """
    report = progress or _report_nothing
    plan = plan_engine(config)
    if plan.devices[0].platform != "cpu":  # a CPU's pools take a share of the host that leaves room for programs
        plan = with_kept_free(plan, measure_working_bytes(plan, report))
    keys = [key for group in plan.groups for key in plan.shapes.keys(group)]
    keys += plan.shapes.relayout_keys(plan.groups)
    runner = make_runner(plan, keys, report)
    runner.warm_up(lambda done, total: report("warming up", done, total))
    return LoadedModel(plan, runner)


def make_runner(plan: EnginePlan, keys: Iterable[ExecutableKey], report: ReportProgress) -> ModelRunner:
    """Places the weights and pools of a plan and compiles the programs of these keys.

    Raises:
        CheckpointError, CompileError: one line that says what to do.
    """
    compile_counter = CompileCounter()
    meshes = DeviceMeshes(plan.devices, plan.base_tp)
    weights = _load_weights(plan, meshes, report)
    executables = _compile(plan, meshes, list(keys), "compiling", report)
    # After compiling: on a GPU, XLA tries variants of a program in the memory that the pools are about to fill.
    kv = plan.shapes.kv
    pool = DeviceArrays(meshes, (kv.num_blocks, kv.block_elements), storage_dtype(plan.shapes.dtype))
    return ModelRunner(plan.shapes, meshes, weights, pool, executables, compile_counter)


def measure_working_bytes(plan: EnginePlan, report: ReportProgress) -> int:
    """Bytes of one device that a plan's programs need besides weights and KV, from compiling the largest of them.

    They are compiled again once the number of blocks is settled, since the pools' shape is part of every program.

    Raises:
        CompileError: naming the first program that failed.
    """
    meshes = DeviceMeshes(plan.devices, plan.base_tp)
    table = _compile(plan, meshes, largest_keys(plan.shapes, plan.groups), "measuring", report)
    return working_bytes(table.programs.values())


def _compile(
    plan: EnginePlan, meshes: DeviceMeshes, keys: list[ExecutableKey], phase: str, report: ReportProgress
) -> ExecutableTable:
    enable_compilation_cache()
    return compile_all(
        ProgramLowerer(plan.shapes, meshes),
        keys,
        workers=os.cpu_count() or 1,
        optimization_level=plan.config.optimization_level,
        progress=lambda done, total: report(phase, done, total),
    )


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs; where that cannot be, says so and goes on without."""
    try:
        folder = cache_dir() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # the folder may be there and read-only
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        _log.warning("compiled programs are not kept (%s): set FLY_JAX_CACHE_DIR to a writable folder", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _load_weights(plan: EnginePlan, meshes: DeviceMeshes, report: ReportProgress) -> WeightsManager:
    spec = plan.shapes.model
    if plan.config.load_format == "dummy":
        drawn = draw_resident(spec, meshes, plan.config.seed, lambda done, total: report("loading", done, total))
        return WeightsManager(spec, meshes, drawn)
    return WeightsManager.from_host(spec, meshes, _load_host(plan, report))


def _load_host(plan: EnginePlan, report: ReportProgress) -> list[Mapping[str, np.ndarray]]:
    """The prepared buffers of each base shard."""
    count = plan.base_tp

    def load(shard: int) -> Mapping[str, np.ndarray]:
        def progress(done: int, total: int) -> None:
            report("loading", shard * total + done, count * total)

        shapes = plan.shapes
        return load_weights(plan.config.model, shapes.model, shapes.dtype, base_shard=(shard, count), progress=progress)

    return [load(shard) for shard in range(count)]


def _report_nothing(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
