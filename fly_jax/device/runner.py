"""Launches steps on the devices and reads their results. Only the engine's one thread calls it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax import Array

from fly_jax.device.buckets import Buckets
from fly_jax.device.device_arrays import DeviceArrays
from fly_jax.device.executables import ExecutableKey, ExecutableTable, ProgramShapes, StepKind
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.relayout import pack_exchange
from fly_jax.device.step_upload import (
    pack_backbone,
    pack_sampling,
    pack_scoring,
    places,
    sampled_rows,
)
from fly_jax.device.weights import WeightsManager
from fly_jax.errors import CompileError
from fly_jax.kv.slabs import CHUNK_SLABS, HeadSplits, PackedRelayout, SlabMove, exchange_rounds
from fly_jax.layout import DeviceGroup
from fly_jax.logprobs import PromptLogprobs, TokenLogprob
from fly_jax.sampling_params import MAX_LOGPROBS
from fly_jax.scheduling.step import ScheduledRow, StepPlan

# How often groups are asked for results while none has any.
POLL_SECONDS = 1e-4
# Of so many runs at warm-up the fastest counts: on a busy host, one run alone took up to ten times as long.
TIMED_RUNS = 3


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A launched step whose results are on their way to the host.

    Attributes:
        results: int32 bits ``[rows, RESULT_COLUMNS]``, None if no row samples.
        scores: int32 bits ``[token places, 2]``, None if no row wants prompt log-probabilities.
        alternatives: int32 bits ``[token places, 2 * MAX_LOGPROBS]``, None if no row wants those of prompt tokens.
    """

    plan: StepPlan
    results: Array | None
    scores: Array | None
    alternatives: Array | None
    marker: Array

    @property
    def ready(self) -> bool:
        return bool(cast(Any, self.marker).is_ready())


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of a step produced.

    Attributes:
        token: the sampled token, None if the row did not sample.
        scores: prompt log-probabilities of the tokens after the row's positions.
    """

    row: ScheduledRow
    token: TokenLogprob | None
    scores: PromptLogprobs | None = None

    @property
    def failed(self) -> bool:
        """The row's logits were no distribution; see :func:`fly_jax.device.sampling.log_probabilities`."""
        if self.token is not None and math.isnan(self.token.logprob):
            return True
        return self.scores is not None and bool(np.isnan(self.scores.logprobs).any())


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """The weights as a group sees them."""

    decoder: tuple[Array, ...]
    head: tuple[Array, ...]


class ModelRunner:
    """Turns step plans into launches: pack, backbone, head.

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
    ) -> None:
        self.shapes, self.meshes = shapes, meshes
        self.weights, self.pool, self.executables = weights, pool, executables
        self.tokens = DeviceArrays(meshes, (1, shapes.slots), np.dtype(np.int32))
        self._groups: dict[DeviceGroup, GroupWeights] = {}
        for group in sorted({key.group for key in executables.programs}):
            self._groups[group] = GroupWeights(weights.decoder(group), weights.head(group))

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Starts a step and returns without waiting for it."""
        state = self._groups[plan.group]
        key, packed = self._pack(plan)
        hidden, sample_hidden = self._run_backbone(key, packed)
        rows = sampled_rows(plan)
        results = scores = alternatives = None
        if rows:
            bucket = Buckets.pick(self.shapes.buckets(plan.group.tp).rows, len(rows))
            sampling = pack_sampling(rows, bucket, pad_slot=self.shapes.slots - 1)
            results = self._run_head(ExecutableKey(plan.group, StepKind.HEAD, bucket), sample_hidden, sampling)
            results.copy_to_host_async()
        if any(row.scores for row in plan.prefills):
            score = self.executables[ExecutableKey(plan.group, StepKind.SCORE, key.bucket)]
            scores, alternatives = score(state.head, hidden, pack_scoring(plan, key.bucket))
            scores.copy_to_host_async()
            if any(row.request.params.prompt_logprobs for row in plan.prefills):
                alternatives.copy_to_host_async()
            else:
                alternatives = None
        marker = results if results is not None else scores if scores is not None else sample_hidden
        return InFlightStep(plan, results, scores, alternatives, marker)

    def wait_for_any(self, steps: Collection[InFlightStep]) -> None:
        """Waits until one of the steps is ready, so that a slow group does not hold up the others.

        There is no way to wait for whichever of several programs ends first, so this asks again and again, and lets
        other threads run in between.
        """
        if len({step.plan.group for step in steps}) > 1:
            while not any(step.ready for step in steps):
                time.sleep(POLL_SECONDS)

    def harvest(self, step: InFlightStep) -> list[RowResult]:
        """Waits for a step and reads what its rows produced.

        Raises:
            RuntimeError: the device program failed.
        """
        step.marker.block_until_ready()
        tokens = iter(()) if step.results is None else _read_tokens(step.plan, np.asarray(step.results))
        scores = None if step.scores is None else np.asarray(step.scores)
        others = None if step.alternatives is None else np.asarray(step.alternatives)
        return [
            RowResult(row, next(tokens) if row.samples else None, _read_scores(row, place, scores, others))
            for row, place in zip(step.plan.rows, places(step.plan), strict=True)
        ]

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

    def _pack(self, plan: StepPlan) -> tuple[ExecutableKey, np.ndarray]:
        buckets = self.shapes.buckets(plan.group.tp)
        if plan.prefills:
            key = ExecutableKey(plan.group, StepKind.MIXED, Buckets.pick(buckets.tokens, plan.num_tiled_tokens))
        else:
            key = ExecutableKey(plan.group, StepKind.DECODE, Buckets.pick(buckets.rows, len(plan.decodes)))
        return key, pack_backbone(plan, self.shapes.backbone(key))

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


def _read_tokens(plan: StepPlan, results: np.ndarray) -> Iterator[TokenLogprob]:
    """The sampled tokens, in the order of the rows that sample; see :func:`fly_jax.device.sampling.results`."""
    ids, floats = results[:, 2 : 2 + MAX_LOGPROBS], results.view(np.float32)
    for index, row in enumerate(sampled_rows(plan)):
        count = row.request.params.logprobs or 0
        values = floats[index, 2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + count].tolist()
        top = tuple(zip(ids[index, :count].tolist(), values, strict=True))
        yield TokenLogprob(int(results[index, 0]), float(floats[index, 1]), top)


def _read_scores(
    row: ScheduledRow, place: int, scores: np.ndarray | None, alternatives: np.ndarray | None
) -> PromptLogprobs | None:
    """Of the prompt tokens that follow the row's positions; see :func:`fly_jax.device.sampling.scores`."""
    if scores is None or not row.scores:
        return None
    prompt, top = row.request.prompt_ids, row.request.params.prompt_logprobs or 0
    follow = np.asarray(prompt[row.start + 1 : row.start + row.count + 1], np.int32)
    own = scores[place : place + len(follow)]
    if alternatives is None:
        alternatives = scores[:, :0]
    others = alternatives[place : place + len(follow)]
    ids, values = others[:, :top], others.view(np.float32)[:, MAX_LOGPROBS : MAX_LOGPROBS + top]
    # Copies: a slice would keep the whole step's array.
    return PromptLogprobs(follow, own.view(np.float32)[:, 0].copy(), own[:, 1].copy(), ids.copy(), values.copy())
