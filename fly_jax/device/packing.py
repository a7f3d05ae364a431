"""From a step's plan to its launch: which programs, in which buckets, on which uploads. No device takes part."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from fly_jax.device.buckets import Buckets
from fly_jax.device.step_upload import BackboneShape, pack_backbone, pack_sampling, pack_scoring, table_width
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.kv.slabs import CHUNK_SLABS, relayout_splits
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.launch import ExecutableKey, Launch, StepKind, Work
from fly_jax.scheduling.step import SchedulerLimits, StepPlan


@dataclass(frozen=True)
class StepShapes:
    """The sizes that all steps of one engine agree on.

    Attributes:
        slots: columns of a device's token table; one more than there are for requests, the last for pad rows.
    """

    kv: KVCacheSpec
    limits: SchedulerLimits
    max_model_len: int
    num_devices: int
    base_tp: int

    @property
    def slots(self) -> int:
        return self.limits.slots(self.num_devices, self.base_tp) + 1

    def buckets(self, tp: int) -> Buckets:
        return Buckets.of(self.limits.max_running(tp, self.base_tp), self.limits.tile_budget(tp, self.base_tp))

    def sample_rows(self, tp: int) -> int:
        return self.buckets(tp).rows[-1]

    def backbone(self, key: ExecutableKey) -> BackboneShape:
        mixed = key.kind is StepKind.MIXED
        sample_rows = self.sample_rows(key.group.tp)
        rows = sample_rows if mixed else key.bucket
        width = table_width(self.kv, self.max_model_len, key.group.tp)
        return BackboneShape(key.bucket, rows, width, sample_rows, mixed)

    def keys(self, group: DeviceGroup) -> Iterator[ExecutableKey]:
        """Every step program of one group."""
        buckets = self.buckets(group.tp)
        for kind, sizes in (
            (StepKind.DECODE, buckets.rows),
            (StepKind.MIXED, buckets.tokens),
            (StepKind.HEAD, buckets.rows),
            (StepKind.SCORE, buckets.tokens),
        ):
            for size in sizes:
                yield ExecutableKey(group, kind, size)

    def relayout_keys(self, groups: Collection[DeviceGroup]) -> Iterator[ExecutableKey]:
        """Every relayout between two of these groups."""
        for group in groups:
            for splits in relayout_splits(group, self.base_tp):
                narrower = min(splits.source_tp, splits.target_tp)
                if any(other.tp == narrower and other.overlaps(group) for other in groups):
                    yield ExecutableKey(group, StepKind.RELAYOUT, CHUNK_SLABS, splits)

    def key_of(self, plan: StepPlan) -> ExecutableKey:
        """Of the program that takes a plan through the layers."""
        buckets = self.buckets(plan.group.tp)
        if plan.prefills:
            return ExecutableKey(plan.group, StepKind.MIXED, Buckets.pick(buckets.tokens, plan.num_tiled_tokens))
        return ExecutableKey(plan.group, StepKind.DECODE, Buckets.pick(buckets.rows, len(plan.decodes)))


def pack_step(plan: StepPlan, shapes: StepShapes) -> Launch:
    """The launch of a step: backbone, head if some row samples, score if some chunk wants its log-probabilities."""
    key, rows = shapes.key_of(plan), plan.sampled
    arrays: dict[ExecutableKey, np.ndarray] = {key: pack_backbone(plan, shapes.backbone(key))}
    if rows:
        bucket = Buckets.pick(shapes.buckets(plan.group.tp).rows, len(rows))
        head = ExecutableKey(plan.group, StepKind.HEAD, bucket)
        arrays[head] = pack_sampling(rows, bucket, pad_slot=shapes.slots - 1)
    if any(row.scores for row in plan.prefills):
        arrays[ExecutableKey(plan.group, StepKind.SCORE, key.bucket)] = pack_scoring(plan, key.bucket)
    wanted = any(row.request.params.prompt_logprobs for row in plan.prefills)
    return Launch(key, arrays, Work.of(plan), alternatives=wanted)
