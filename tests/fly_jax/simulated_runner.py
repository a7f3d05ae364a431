"""A runner without devices: it keeps what a device would, so that misplaced KV shows up as a wrong token.

Launches take effect at once and in order, as on a device. Their results reach the host when
:attr:`SimulatedStep.ready` says so, in any order over the groups.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from fly_jax.engine import Engine
from fly_jax.group_scheduler import ScheduledRow, SchedulerLimits, StepPlan
from fly_jax.kv_cache import BlockTable, KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.outputs import TokenLogprob
from fly_jax.runner import RowResult

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
class _Cell:
    """One token's KV on one device; ``table`` tells lives of a request apart."""

    table: BlockTable
    position: int
    token: int


class SimulatedRunner:
    """Stands in for :class:`fly_jax.runner.ModelRunner`.

    Args:
        instant: results reach the host at once; otherwise when a test says so or the engine waits for them.

    Attributes:
        plans: every plan launched, oldest first.
        unread: launched steps that are not harvested.
    """

    def __init__(self, kv: KVCacheSpec, base_tp: int, *, instant: bool) -> None:
        self.instant = instant
        self.plans: list[StepPlan] = []
        self.unread: list[SimulatedStep] = []
        self._kv, self._base_tp = kv, base_tp
        self._pool: dict[tuple[int, int, int], _Cell] = {}
        self._slot_tokens: dict[DeviceGroup, dict[int, int]] = defaultdict(dict)

    def launch(self, plan: StepPlan) -> SimulatedStep:
        latest = self._slot_tokens[plan.group]
        for row in plan.rows:
            for position in range(row.start, row.start + row.count):
                token = row.request.token_at(position)
                self._write(row, position, latest[row.slot] if token < 0 else token)
        contexts = [self._read(row) for row in plan.rows]
        results = [_result(row, seen) for row, seen in zip(plan.rows, contexts, strict=True)]
        step = SimulatedStep(plan, results, ready=self.instant)
        for result in step.results:
            if result.token is not None:
                latest[result.row.slot] = result.token.token_id
        self.plans.append(plan)
        self.unread.append(step)
        return step

    def wait_for_any(self, steps: Collection[SimulatedStep]) -> None:
        """Leaves the choice to the engine: it then waits for the oldest launch."""

    def harvest(self, step: SimulatedStep) -> list[RowResult]:
        self.unread.remove(step)
        return step.results

    def _places(self, table: BlockTable, position: int) -> list[tuple[int, int, int]]:
        block, offset = divmod(position, self._kv.block_tokens(table.group.size))
        devices = table.group.rank_order(self._base_tp)
        return [(device, row[block], offset) for device, row in zip(devices, table.rows, strict=True)]

    def _write(self, row: ScheduledRow, position: int, token: int) -> None:
        assert row.request.table is not None
        for place in self._places(row.request.table, position):
            self._pool[place] = _Cell(row.request.table, position, token)

    def _read(self, row: ScheduledRow) -> list[int]:
        """The row's context from the pool; every rank must hold it."""
        table = row.request.table
        assert table is not None
        tokens = []
        for position in range(row.start + row.count):
            cells = [self._pool.get(place) for place in self._places(table, position)]
            for cell in cells:
                assert cell is not None, f"{row.request.request_id} reads position {position} that nobody wrote"
                assert cell.table is table, f"{row.request.request_id} reads KV that is not its own at {position}"
                assert cell.position == position
            tokens.append(cast(_Cell, cells[0]).token)
        return tokens


def _result(row: ScheduledRow, context: list[int]) -> RowResult:
    prompt = row.request.prompt_ids
    scores: tuple[float, ...] = ()
    if row.scores:
        end = min(row.start + row.count, len(prompt) - 1)
        scores = tuple(prompt_score(prompt[: position + 2]) for position in range(row.start, end))
    token = TokenLogprob(next_token(context), -1.0) if row.samples else None
    return RowResult(row, token, scores)


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
    overlap: bool = True,
    instant: bool = True,
) -> tuple[Engine, SimulatedRunner]:
    """The real engine, scheduler and block accounting over a simulated runner."""
    kv = KVCacheSpec(num_blocks, block_size, num_layers=1, kv_heads=kv_heads, head_dim=16, bytes_per_element=2)
    runner = SimulatedRunner(kv, base_tp, instant=instant)
    plan = SimpleNamespace(
        config=SimpleNamespace(max_num_queued_reqs=max_queued, overlap=overlap, seed=0),
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        tokenizer=SimpleNamespace(stream=lambda skip_special_tokens: _TextStream()),  # noqa: ARG005
        eos_token_ids=frozenset({EOS}),
        devices=tuple(range(num_devices)),
        base_tp=base_tp,
        layout=Layout.parse(layout, num_devices, base_tp),
        groups=all_groups(num_devices, base_tp),
        limits=SchedulerLimits(max_num_seqs, max_num_batched_tokens),
        shapes=SimpleNamespace(kv=kv),
        max_model_len=max_model_len,
    )
    model: Any = SimpleNamespace(plan=plan, runner=runner, compiles=SimpleNamespace(count=0))
    return Engine(model), runner
