"""A runner without devices: it keeps what a device would, so that misplaced KV shows up as a wrong token.

Launches take effect at once and in order, as on a device. Their results reach the host when
:attr:`SimulatedStep.ready` says so, in any order over the groups.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from fly_jax.device.executables import ExecutableKey
from fly_jax.device.runner import RowResult
from fly_jax.engine.engine import Engine
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.kv.slabs import HeadSplits, PackedRelayout, SlabMove, SlabPlace, exchange_rounds
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.step import ScheduledRow, SchedulerLimits, StepPlan
from tests.fly_jax.builders import own_logprobs

VOCABULARY = 64
EOS = 0


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
    plan: StepPlan
    results: list[RowResult]
    ready: bool


@dataclass(frozen=True)
class Launch:
    """One launch of a relayout."""

    moves: tuple[SlabMove, ...]
    token_devices: dict[int, int]


class SimulatedRunner:
    """Stands in for :class:`fly_jax.device.runner.ModelRunner`.

    A device's pool is ``[blocks, heads * tokens, 4]``: one record ``(life, KV head, position, token)`` for each head
    and token, in the order in which a block holds them at the degree that wrote it. A life is a request from one
    start of its prompt to the next. Every device has its own table of latest tokens, as on devices.

    Args:
        instant: results reach the host at once; otherwise when a test says so or the engine waits for them.

    Attributes:
        plans: every plan launched, oldest first.
        chunk_slabs: few, so that most relayouts take several launches.
        relayouts: every relayout launched, oldest first.
        unread: launched steps that are not harvested.
    """

    chunk_slabs = 2

    def __init__(self, kv: KVCacheSpec, num_devices: int, base_tp: int, num_slots: int, *, instant: bool) -> None:
        self.instant = instant
        self.executables = SimulatedExecutables()
        self.weights, self.pool = SimpleNamespace(resident_bytes=0), SimpleNamespace(nbytes=0)
        self.plans: list[StepPlan] = []
        self.relayouts: list[PackedRelayout] = []
        self.unread: list[SimulatedStep] = []
        self.kv, self._base_tp = kv, base_tp
        self._pools = np.full((num_devices, kv.num_blocks, kv.kv_heads * kv.base_block_size, 4), -1)
        self._tokens = np.full((num_devices, num_slots), -1)
        self._lives: dict[Request, int] = {}
        self._new_life = itertools.count()

    def launch(self, plan: StepPlan) -> SimulatedStep:
        for row in plan.rows:
            self._write(row)
        contexts = [self._read(row) for row in plan.rows]
        results = [_result(row, seen) for row, seen in zip(plan.rows, contexts, strict=True)]
        for result in results:
            if result.token is not None:
                self._tokens[plan.group.device_indices, result.row.slot] = result.token.token_id
        step = SimulatedStep(plan, results, ready=self.instant)
        self.plans.append(plan)
        self.unread.append(step)
        return step

    def wait_for_any(self, steps: Collection[SimulatedStep]) -> None:
        """Leaves the choice to the engine: it then waits for the oldest launch."""

    def harvest(self, step: SimulatedStep) -> list[RowResult]:
        self.unread.remove(step)
        return step.results

    def pack_relayout(
        self, group: DeviceGroup, splits: HeadSplits, moves: Sequence[SlabMove], token_devices: Mapping[int, int]
    ) -> PackedRelayout:
        rounds = list(exchange_rounds(moves, self.chunk_slabs)) or [[]]
        uploads = tuple(Launch(tuple(each), dict(token_devices)) for each in rounds)
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

    def _write(self, row: ScheduledRow) -> None:
        request, table, tp = row.request, row.request.held_table, row.request.held_table.group.tp
        if row.start == 0:
            self._lives[request] = next(self._new_life)
        for rank, device in enumerate(table.group.rank_order(self._base_tp)):
            for position in range(row.start, row.start + row.count):
                token = request.token_at(position)
                if token < 0:
                    token = self._tokens[device, row.slot]
                block, offset = divmod(position, self.kv.block_tokens(tp))
                records = self._block(tp, device, table.rows[rank][block])
                for index, head in enumerate(self._heads(tp, rank)):
                    records[index, offset] = (self._lives[request], head, position, token)

    def _read(self, row: ScheduledRow) -> list[int]:
        """The row's context from the pools; every head on every rank must hold it."""
        request, table, tp = row.request, row.request.held_table, row.request.held_table.group.tp
        count, tokens = row.start + row.count, None
        for rank, device in enumerate(table.group.rank_order(self._base_tp)):
            blocks = [self._block(tp, device, block) for block in table.rows[rank]]
            records = np.concatenate(blocks, axis=1)[:, :count]
            heads = np.array(self._heads(tp, rank))[:, None]
            where = f"{request.request_id} reads on rank {rank} of {table.group} "
            assert (records[:, :, 0] == self._lives[request]).all(), where + "KV that is not its own"
            assert (records[:, :, 1] == heads).all(), where + "another head's KV"
            assert (records[:, :, 2] == np.arange(count)).all(), where + "KV of other positions"
            tokens = records[0, :, 3] if tokens is None else tokens
            assert (records[:, :, 3] == tokens).all(), where + "KV of other tokens"
        assert tokens is not None
        return tokens.tolist()


def _result(row: ScheduledRow, context: list[int]) -> RowResult:
    prompt = row.request.prompt_ids
    scores = None
    if row.scores:
        follow = prompt[row.start + 1 : row.start + row.count + 1]
        scores = own_logprobs(follow, [prompt_score(prompt[: row.start + 2 + index]) for index in range(len(follow))])
    token = TokenLogprob(next_token(context), -1.0) if row.samples else None
    return RowResult(row, token, scores)


class SimulatedExecutables:
    """None at all, with the step times that they would have."""

    compile_seconds = 0.0

    def __init__(self) -> None:
        self.step_seconds: Mapping[ExecutableKey, float] = {}

    def __len__(self) -> int:
        return 0


class _TextStream:
    """Every token is one character."""

    def push(self, token_id: int) -> str:
        return chr(ord("0") + token_id)

    def flush(self) -> str:
        return ""


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
    runner = runner_type(kv, num_devices, base_tp, limits.slots(num_devices, base_tp), instant=instant)
    runner.executables.step_seconds = step_seconds or {}
    plan = SimpleNamespace(
        config=SimpleNamespace(
            max_num_queued_reqs=max_queued,
            queued_per_client=queued_per_client,
            allow_request_width=allow_request_width,
            engine_timeout=0.0,
            overlap=overlap,
            seed=0,
            policy=policy,
            switch_strategy=strategy,
            scheduling_policy=scheduling_policy,
        ),
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        tokenizer=SimpleNamespace(
            stream=lambda skip_special_tokens, prompt_ids: _TextStream(),  # noqa: ARG005
            special_in=lambda texts: {},  # noqa: ARG005
        ),
        eos_token_ids=frozenset({EOS}),
        devices=tuple(range(num_devices)),
        base_tp=base_tp,
        layout=Layout.parse(layout, num_devices, base_tp),
        groups=all_groups(num_devices, base_tp),
        limits=limits,
        shapes=SimpleNamespace(kv=kv),
        max_model_len=max_model_len,
    )
    model: Any = SimpleNamespace(plan=plan, runner=runner, compiles=SimpleNamespace(count=0))
    return Engine(model, clock), runner
