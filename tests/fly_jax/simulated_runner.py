"""A runner without devices: it keeps what a device would, so that misplaced KV shows up as a wrong token.

Launches take effect at once and in order, as on a device. Their results reach the host when
:attr:`SimulatedStep.ready` says so, in any order over the groups.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fly_jax.config import EngineConfig
from fly_jax.device.packing import StepShapes, pack_step
from fly_jax.device.step_upload import PackedLayout, sampling_layout, scoring_layout
from fly_jax.engine.engine import Engine
from fly_jax.engine.served import ServedModel
from fly_jax.engine.step_times import step_times_of
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.kv.slabs import HeadSplits, PackedRelayout, SlabMove, SlabPlace, exchange_rounds
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.outputs import SwitchStrategy
from fly_jax.policy.observation import Machine
from fly_jax.sampling_params import SamplingDefaults
from fly_jax.scheduling.launch import ExecutableKey, Launch, StepKind
from fly_jax.scheduling.results import RESULT_COLUMNS, StepResults
from fly_jax.scheduling.runner import RunnerInfo, StepInFlight
from fly_jax.scheduling.step import SchedulerLimits, StepPlan
from fly_jax.text.tokenizer import placeholder_tokenizer

VOCABULARY = 64
EOS = 0
TOKENIZER = placeholder_tokenizer(256)


def next_token(tokens: Sequence[int]) -> int:
    """What the simulated model samples after these tokens: 1 in 32 contexts ends the sequence."""
    digest = zlib.crc32(bytes(tokens))
    return EOS if digest % 32 == 0 else 1 + digest % (VOCABULARY - 1)


def prompt_score(tokens: Sequence[int]) -> float:
    """The simulated log-probability of the last token after those before it."""
    return -float(zlib.crc32(b"score" + bytes(tokens)) % 1000)


def expected_output(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What a request generates alone, on any layout."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass(eq=False)
class SimulatedStep:
    """A launch that has taken effect.

    Attributes:
        plan: that it was packed from.
        ready: its results have reached the host.
    """

    runner: SimulatedRunner
    plan: StepPlan
    found: StepResults
    ready: bool

    def results(self) -> StepResults:
        self.runner.unread.remove(self)
        return self.found


@dataclass(frozen=True)
class RelayoutLaunch:
    """One launch of a relayout."""

    moves: tuple[SlabMove, ...]
    token_devices: dict[int, int]


@dataclass(frozen=True)
class _Row:
    """A request's row of a step, as its upload says.

    Attributes:
        places: token places, and their tokens.
        tables: the blocks of each rank.
    """

    slot: int
    start: int
    places: np.ndarray
    tokens: np.ndarray
    tables: np.ndarray

    @property
    def count(self) -> int:
        return len(self.places)


class SimulatedRunner:
    """A :class:`fly_jax.scheduling.runner.Runner` without devices, which knows of requests what their uploads say.

    A device's pool is ``[blocks, heads * tokens, 4]``: one record ``(life, KV head, position, token)`` for each head
    and token, in the order in which a block holds them at the degree that wrote it. A life is what a slot is used for
    from one start of a prompt to the next. Every device has its own table of latest tokens, as on devices.

    Args:
        instant: results reach the host at once; otherwise when a test says so or the engine waits for them.

    Attributes:
        plans: every plan packed, oldest first.
        chunk_slabs: few, so that most relayouts take several launches.
        relayouts: every relayout launched, oldest first.
        unread: launched steps that are not harvested.
        on_pack: called with each plan and its launch.
    """

    chunk_slabs = 2
    compiles = 0

    def __init__(self, shapes: StepShapes, *, instant: bool = True, info: RunnerInfo | None = None) -> None:
        self.shapes, self.kv, self.instant = shapes, shapes.kv, instant
        self.info = info or RunnerInfo()
        self.plans: list[StepPlan] = []
        self.relayouts: list[PackedRelayout] = []
        self.unread: list[SimulatedStep] = []
        self.on_pack: Callable[[StepPlan, Launch], None] = lambda *_: None
        self._base_tp = shapes.base_tp
        kv = shapes.kv
        self._pools = np.full((shapes.num_devices, kv.num_blocks, kv.kv_heads * kv.base_block_size, 4), -1)
        self._tokens = np.full((shapes.num_devices, shapes.slots), -1)
        self._lives = np.full(shapes.slots, -1)
        self._new_life = itertools.count()
        self._packed: Launch | None = None

    def pack(self, plan: StepPlan) -> Launch:
        self.plans.append(plan)
        self._packed = pack_step(plan, self.shapes)
        self.on_pack(plan, self._packed)
        return self._packed

    def execute(self, launch: Launch) -> StepInFlight:
        assert launch is self._packed, "a step is executed as soon as it is packed"
        step = SimulatedStep(self, self.plans[-1], self.compute(launch), ready=self.instant)
        self.unread.append(step)
        return step

    def compute(self, launch: Launch) -> StepResults:
        """Writes the step's KV, reads each row's context back, and answers with what the model makes of it."""
        rows = list(self._rows(launch))
        for row in rows:
            self._write(launch.key.group, row)
        contexts = [self._read(launch.key.group, row) for row in rows]
        tokens = scores = None
        for key, upload in launch.arrays.items():
            if key.kind is StepKind.HEAD:
                columns = sampling_layout(key.bucket).unpack(upload[0])
                places = self._unpacked(launch)[0]["sample_places"]
                tokens = self._sample(key.group, columns["slots"], places, rows, contexts)
            elif key.kind is StepKind.SCORE:
                scores = _scores(scoring_layout(key.bucket).unpack(upload[0])["targets"], rows, contexts)
        return StepResults(tokens, scores)

    def wait_for_any(self, steps: Collection[StepInFlight]) -> None:
        """Leaves the choice to the engine: it then waits for the oldest launch."""

    def pack_relayout(
        self, group: DeviceGroup, splits: HeadSplits, moves: Sequence[SlabMove], token_devices: Mapping[int, int]
    ) -> PackedRelayout:
        rounds = list(exchange_rounds(moves, self.chunk_slabs)) or [[]]
        uploads = tuple(RelayoutLaunch(tuple(each), dict(token_devices)) for each in rounds)
        num_bytes = len(moves) * self.kv.slab_bytes(splits.source_tp, splits.target_tp)
        return PackedRelayout(group, splits, num_bytes, uploads)

    def relayout(self, packed: PackedRelayout) -> None:
        self.relayouts.append(packed)
        group, splits = packed.group, packed.splits
        for launch in packed.uploads:
            # All reads come before all writes, as in the device program.
            slabs = [self._slab(group, splits.source_tp, splits, move.source).copy() for move in launch.moves]
            for move, slab in zip(launch.moves, slabs, strict=True):
                self._slab(group, splits.target_tp, splits, move.target)[:] = slab
            latest = {slot: self._tokens[device, slot] for slot, device in launch.token_devices.items()}
            assert set(launch.token_devices.values()) <= set(group.device_indices)
            for slot, token in latest.items():
                self._tokens[group.device_indices, slot] = token

    def _slab(self, group: DeviceGroup, tp: int, splits: HeadSplits, place: SlabPlace) -> np.ndarray:
        """A slab's records ``[heads, tokens, 4]``, as a view of the pool."""
        assert place.device in group.device_indices
        degrees = (splits.source_tp, splits.target_tp)
        heads = min(self.kv.local_kv_heads(degree) for degree in degrees)
        tokens = min(self.kv.block_tokens(degree) for degree in degrees)
        head_parts, token_parts = self.kv.local_kv_heads(tp) // heads, self.kv.block_tokens(tp) // tokens
        block = self._pools[place.device, place.block].reshape(head_parts, heads, token_parts, tokens, 4)
        return block[0, :, place.part] if token_parts > 1 else block[place.part, :, 0]

    def _block(self, tp: int, device: int, block: int) -> np.ndarray:
        """A block's records ``[heads, tokens, 4]`` as a step of this degree sees them, as a view of the pool."""
        shape = (self.kv.local_kv_heads(tp), self.kv.block_tokens(tp), 4)
        return self._pools[device, block].reshape(shape)

    def _heads(self, tp: int, rank: int) -> range:
        first = self.kv.first_kv_head(tp, rank)
        return range(first, first + self.kv.local_kv_heads(tp))

    def _unpacked(self, launch: Launch) -> list[dict[str, np.ndarray]]:
        """The upload of each rank, by name."""
        layout: PackedLayout = self.shapes.backbone(launch.key).layout
        return [layout.unpack(each) for each in launch.arrays[launch.key]]

    def _rows(self, launch: Launch) -> Iterator[_Row]:
        ranks = self._unpacked(launch)
        fields = ranks[0]
        used = np.flatnonzero(fields["positions"] >= 0)
        for index in range(fields["token_rows"][used].max(initial=-1) + 1):
            places = used[fields["token_rows"][used] == index]
            positions = fields["positions"][places]
            assert (positions == np.arange(positions[0], positions[0] + len(places))).all()
            tables = np.stack([rank["tables"][index] for rank in ranks])
            slot = int(fields["row_slots"][index])
            yield _Row(slot, int(positions[0]), places, fields["tokens"][places], tables)

    def _write(self, group: DeviceGroup, row: _Row) -> None:
        if row.start == 0:
            self._lives[row.slot] = next(self._new_life)
        for rank, device in enumerate(group.rank_order(self._base_tp)):
            for position, token in enumerate(row.tokens.tolist(), start=row.start):
                if token < 0:
                    token = self._tokens[device, row.slot]
                block, offset = divmod(position, self.kv.block_tokens(group.tp))
                records = self._block(group.tp, device, row.tables[rank, block])
                for index, head in enumerate(self._heads(group.tp, rank)):
                    records[index, offset] = (self._lives[row.slot], head, position, token)

    def _read(self, group: DeviceGroup, row: _Row) -> list[int]:
        """The row's context from the pools; every head on every rank must hold it."""
        tp, count, tokens = group.tp, row.start + row.count, None
        for rank, device in enumerate(group.rank_order(self._base_tp)):
            held = row.tables[rank, : -(-count // self.kv.block_tokens(tp))]
            records = np.concatenate([self._block(tp, device, block) for block in held], axis=1)[:, :count]
            heads = np.array(self._heads(tp, rank))[:, None]
            where = f"slot {row.slot} reads on rank {rank} of {group} "
            assert (records[:, :, 0] == self._lives[row.slot]).all(), where + "KV that is not its own"
            assert (records[:, :, 1] == heads).all(), where + "another head's KV"
            assert (records[:, :, 2] == np.arange(count)).all(), where + "KV of other positions"
            tokens = records[0, :, 3] if tokens is None else tokens
            assert (records[:, :, 3] == tokens).all(), where + "KV of other tokens"
        assert tokens is not None
        return tokens.tolist()

    def _sample(
        self, group: DeviceGroup, slots: np.ndarray, places: np.ndarray, rows: list[_Row], contexts: list[list[int]]
    ) -> np.ndarray:
        """The results of a head, ``[rows, RESULT_COLUMNS]``; sampled tokens go into the table of every device."""
        last = {int(row.places[-1]): index for index, row in enumerate(rows)}
        sampled = [last[place] for place in places[: np.count_nonzero(slots < self.shapes.slots - 1)].tolist()]
        results = sampled_results([next_token(contexts[index]) for index in sampled])
        for result, index, slot in zip(results, sampled, slots.tolist(), strict=False):
            assert slot == rows[index].slot
            self._tokens[group.device_indices, slot] = result[0]
        return results


def sampled_results(tokens: Sequence[int]) -> np.ndarray:
    """Results of a head, each with a log-probability of -1."""
    results = np.zeros((len(tokens), RESULT_COLUMNS), np.int32)
    results[:, 0], results.view(np.float32)[:, 1] = tokens, -1.0
    return results


def _scores(targets: np.ndarray, rows: list[_Row], contexts: list[list[int]]) -> np.ndarray:
    """Results of a score program, ``[token places, 2]``; each target has rank 1."""
    scores = np.ones((len(targets), 2), np.int32)
    for row, context in zip(rows, contexts, strict=True):
        for place, end in enumerate(range(row.start + 1, row.start + row.count + 1), start=int(row.places[0])):
            scores.view(np.float32)[place, 0] = prompt_score([*context[:end], int(targets[place])])
    return scores


def simulated_engine(
    *,
    layout: str = "1+1+1+1",
    num_devices: int = 4,
    base_tp: int = 1,
    num_blocks: int = 64,
    block_size: int = 4,
    kv_heads: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 256,
    max_queued: int = 1024,
    queued_per_client: int = 1024,
    allow_request_width: bool = True,
    overlap: bool = True,
    instant: bool = True,
    policy: str = "static",
    scheduling_policy: str = "priority",
    strategy: SwitchStrategy = SwitchStrategy.MIGRATE,
    patience: int = 512,
    clock: Callable[[], float] = time.perf_counter,
    runner_type: type[SimulatedRunner] = SimulatedRunner,
    step_seconds: Mapping[ExecutableKey, float] | None = None,
) -> tuple[Engine, SimulatedRunner]:
    """The real engine, scheduler and block accounting over a simulated runner."""
    kv = KVCacheSpec(num_blocks, block_size, num_layers=1, kv_heads=kv_heads, head_dim=16, bytes_per_element=2)
    limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, patience)
    runner = runner_type(
        StepShapes(kv, limits, max_model_len, num_devices, base_tp),
        instant=instant,
        info=RunnerInfo(step_seconds=step_seconds or {}),
    )
    config = EngineConfig(
        model=Path("simulated"),
        max_num_queued_reqs=max_queued,
        max_queued_per_client=queued_per_client,
        allow_request_width=allow_request_width,
        engine_timeout=0.0,
        overlap=overlap,
        policy=policy,
        switch_strategy=strategy,
        scheduling_policy=scheduling_policy,
    )
    machine = Machine(
        num_devices=num_devices,
        base_tp=base_tp,
        groups=frozenset(all_groups(num_devices, base_tp)),
        kv=kv,
        limits=limits,
        step_times=step_times_of(runner.info.step_seconds),
    )
    served = ServedModel(TOKENIZER, frozenset({EOS}), VOCABULARY, max_model_len, SamplingDefaults())
    return Engine(config, served, machine, Layout.parse(layout, num_devices, base_tp), runner, clock), runner
