"""Launches steps on the devices and reads their results. Only the engine's one thread calls it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax import Array

from fly_jax.device.device_arrays import DeviceArrays
from fly_jax.device.executables import CompileCounter, ExecutableTable, ProgramShapes
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.packing import pack_step
from fly_jax.device.relayout import pack_exchange
from fly_jax.device.step_upload import pack_backbone, pack_sampling, pack_scoring
from fly_jax.device.weights import WeightsManager
from fly_jax.errors import CompileError
from fly_jax.kv.slabs import CHUNK_SLABS, HeadSplits, PackedRelayout, SlabMove, exchange_rounds
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.launch import ExecutableKey, Launch, StepKind
from fly_jax.scheduling.results import StepResults
from fly_jax.scheduling.runner import RunnerInfo, StepInFlight
from fly_jax.scheduling.step import StepPlan

# How often groups are asked for results while none has any.
POLL_SECONDS = 1e-4
# Of so many runs at warm-up the fastest counts: on a busy host, one run alone took up to ten times as long.
TIMED_RUNS = 3


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStep:
    """A launched step whose results are on their way to the host.

    Attributes:
        marker: is there when the step has ended.
        tokens, scores, alternatives: as in :class:`fly_jax.scheduling.results.StepResults`.
    """

    marker: Array
    tokens: Array | None = None
    scores: Array | None = None
    alternatives: Array | None = None

    @property
    def ready(self) -> bool:
        return bool(cast(Any, self.marker).is_ready())

    def results(self) -> StepResults:
        """Waits for the step.

        Raises:
            RuntimeError: the device program failed.
        """
        self.marker.block_until_ready()
        arrays = (self.tokens, self.scores, self.alternatives)
        return StepResults(*(None if array is None else np.asarray(array) for array in arrays))


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """The weights as a group sees them."""

    decoder: tuple[Array, ...]
    head: tuple[Array, ...]


class ModelRunner:
    """Executes launches: the programs of a step, and relayouts. A :class:`fly_jax.scheduling.runner.Runner`.

    Programs are called with host arrays, which they upload themselves: putting them on the devices first took 0.1 to
    0.2 ms longer a call, 0.7 of the 1.8 ms that the host needed for a step of one device.
    """

    chunk_slabs = CHUNK_SLABS

    def __init__(
        self,
        shapes: ProgramShapes,
        meshes: DeviceMeshes,
        weights: WeightsManager,
        pool: DeviceArrays,
        executables: ExecutableTable,
        compile_counter: CompileCounter,
    ) -> None:
        self.shapes, self.meshes = shapes, meshes
        self.weights, self.pool, self.executables = weights, pool, executables
        self.compile_counter = compile_counter
        self.tokens = DeviceArrays(meshes, (1, shapes.slots), np.dtype(np.int32))
        self._groups: dict[DeviceGroup, GroupWeights] = {}
        for group in sorted({key.group for key in executables.programs}):
            self._groups[group] = GroupWeights(weights.decoder(group), weights.head(group))

    @property
    def info(self) -> RunnerInfo:
        table = self.executables
        return RunnerInfo(
            programs=len(table),
            compile_seconds=table.compile_seconds,
            step_seconds=table.step_seconds,
            weight_bytes=self.weights.resident_bytes,
            kv_bytes=self.pool.nbytes,
        )

    @property
    def compiles(self) -> int:
        return self.compile_counter.count

    def pack(self, plan: StepPlan) -> Launch:
        return pack_step(plan, self.shapes)

    def execute(self, launch: Launch) -> StepInFlight:
        """Starts a step and returns without waiting for it."""
        (key, upload), *rest = launch.arrays.items()
        hidden, sample_hidden = self._run_backbone(key, upload)
        tokens = scores = alternatives = None
        for key, upload in rest:
            if key.kind is StepKind.HEAD:
                tokens = self._run_head(key, sample_hidden, upload)
                tokens.copy_to_host_async()
            else:
                scores, others = self.executables[key](self._groups[key.group].head, hidden, upload)
                scores.copy_to_host_async()
                if launch.alternatives:
                    alternatives = others
                    alternatives.copy_to_host_async()
        marker = tokens if tokens is not None else scores if scores is not None else sample_hidden
        return DeviceStep(marker, tokens, scores, alternatives)

    def wait_for_any(self, steps: Collection[StepInFlight]) -> None:
        """Waits until one of the steps is ready.

        There is no way to wait for whichever of several programs ends first, so this asks again and again, and lets
        other threads run in between.
        """
        while not any(step.ready for step in steps):
            time.sleep(POLL_SECONDS)

    def pack_relayout(
        self, group: DeviceGroup, splits: HeadSplits, moves: Sequence[SlabMove], token_devices: Mapping[int, int]
    ) -> PackedRelayout:
        """Makes moves of KV between two head splits ready to be launched.

        Args:
            token_devices: slot -> device that holds its latest token; every device of the group then has it.
        """
        kv, ranked = self.shapes.kv, group.rank_order(self.meshes.base_tp)
        # A request whose KV has all been copied ahead still needs its latest token on the new devices.
        rounds = list(exchange_rounds(moves, CHUNK_SLABS)) or [[]]
        uploads = [pack_exchange(each, ranked, token_devices, self.shapes.slots, kv.num_blocks) for each in rounds]
        num_bytes = len(moves) * kv.slab_bytes(splits.source_tp, splits.target_tp)
        return PackedRelayout(group, splits, num_bytes, tuple(uploads))

    def relayout(self, packed: PackedRelayout) -> None:
        """Launches the moves of KV inside a group's devices, without waiting."""
        key = ExecutableKey(packed.group, StepKind.RELAYOUT, CHUNK_SLABS, packed.splits)
        for upload in packed.uploads:
            self._run_relayout(key, upload)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Runs every program and times it: sets up each group's collectives and the step-time table.

        Pool writes go nowhere, for every position is padding.

        Raises:
            CompileError: naming the program that failed to run.
        """
        total = len(self.executables)
        for done, key in enumerate(self.executables.programs, start=1):
            try:
                self._warm_up(key)
                self.executables.step_seconds[key] = min(self._timed(key) for _ in range(TIMED_RUNS))
            except Exception as error:
                raise CompileError(f"running {key} failed at warm-up: {type(error).__name__}: {error}") from error
            progress(done, total)

    def _timed(self, key: ExecutableKey) -> float:
        started = time.perf_counter()
        self._warm_up(key)
        return time.perf_counter() - started

    def _warm_up(self, key: ExecutableKey) -> None:
        shapes, group = self.shapes, key.group
        width = shapes.model.config.hidden_size
        if key.kind in (StepKind.DECODE, StepKind.MIXED):
            empty = pack_backbone(StepPlan(group, (), ()), shapes.backbone(key))
            jax.block_until_ready(self._run_backbone(key, empty))
        elif key.kind is StepKind.RELAYOUT:
            assert key.splits is not None
            self.relayout(self.pack_relayout(group, key.splits, [], {}))
            jax.block_until_ready(self.pool.take(group))
        elif key.kind is StepKind.HEAD:
            hidden = self._zeros(group, (shapes.sample_rows(group.tp), width))
            sampling = pack_sampling((), key.bucket, pad_slot=shapes.slots - 1)
            self._run_head(key, hidden, sampling).block_until_ready()
        else:
            nothing = pack_scoring(StepPlan(group, (), ()), key.bucket)
            hidden = self._zeros(group, (key.bucket, width))
            jax.block_until_ready(self.executables[key](self._groups[group].head, hidden, nothing))

    def _run_backbone(self, key: ExecutableKey, packed: np.ndarray) -> tuple[Array, Array]:
        state = self._groups[key.group]
        pool, hidden, sample_hidden = self.executables[key](
            state.decoder, self.pool.take(key.group), self.tokens.take(key.group), packed
        )
        self.pool.put_back(key.group, pool)
        return hidden, sample_hidden

    def _run_relayout(self, key: ExecutableKey, upload: np.ndarray) -> None:
        group = key.group
        pool, tables = self.executables[key](self.pool.take(group), self.tokens.take(group), upload)
        self.pool.put_back(group, pool)
        self.tokens.put_back(group, tables)

    def _run_head(self, key: ExecutableKey, hidden: Array, sampling: np.ndarray) -> Array:
        state = self._groups[key.group]
        tables, results = self.executables[key](state.head, hidden, self.tokens.take(key.group), sampling)
        self.tokens.put_back(key.group, tables)
        return results

    def _zeros(self, group: DeviceGroup, shape: tuple[int, ...]) -> Array:
        return jax.device_put(np.zeros(shape, self.shapes.dtype), self.meshes.replicated(group))
