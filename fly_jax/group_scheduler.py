"""What one group computes in its next step. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fly_jax.kv_cache import KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.request import Request, RequestState

# Prefill tokens are laid out in tiles of one request each; the attention of a tile shares its reads of the KV cache.
TILE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step of one group."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def tile_budget(self) -> int:
        """The token budget in whole tiles."""
        return max(1, self.max_num_batched_tokens // TILE_TOKENS) * TILE_TOKENS


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Positions ``start .. start + count - 1`` of one request, computed in one step.

    Attributes:
        samples: the last position is the request's newest, so a token is sampled after it.
        scores: prompt log-probabilities are wanted for these positions.
        slot: the request's row of the device-side token table.
    """

    request: Request
    start: int
    count: int
    samples: bool
    scores: bool
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one group: single-token rows, and prompt chunks laid out in tiles."""

    group: DeviceGroup
    decodes: tuple[ScheduledRow, ...]
    prefills: tuple[ScheduledRow, ...]

    @property
    def rows(self) -> tuple[ScheduledRow, ...]:
        return (*self.decodes, *self.prefills)

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def num_tiled_tokens(self) -> int:
        """Token places that the step needs when it holds prompt chunks."""
        return round_up_to_tile(len(self.decodes)) + sum(round_up_to_tile(row.count) for row in self.prefills)


def round_up_to_tile(tokens: int) -> int:
    return -(-tokens // TILE_TOKENS) * TILE_TOKENS


class GroupScheduler:
    """Continuous batching with chunked prefill for one group.

    Decodes go first, each one token; what is left of the token budget goes to prompt chunks in order of
    admission. Blocks of a whole prompt are taken at admission, so only decodes can run short; then the
    latest-admitted request is preempted and later recomputed.
    """

    def __init__(self, group: DeviceGroup, limits: SchedulerLimits, kv: KVCacheManager) -> None:
        self.group = group
        self.limits = limits
        self.kv = kv
        self.running: list[Request] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def admit(self, request: Request) -> bool:
        """Starts a request here if a slot and the blocks of all its known tokens are free."""
        if not self._free_slots:
            return False
        table = self.kv.new_table(self.group)
        reserve = self._decode_reserve()
        if self.kv.missing_blocks(table, request.num_known + 1) + reserve > self.kv.free_blocks(self.group):
            return False
        self.kv.grow(table, request.num_known + 1)
        request.table, request.slot = table, self._free_slots.pop()
        request.state, request.preempted = RequestState.RUNNING, False
        self.running.append(request)
        return True

    def remove(self, request: Request) -> None:
        """Takes a request out and frees its slot and blocks; its KV is gone.

        A step in flight may still write to the freed blocks. That is harmless: whoever gets them next writes
        in a later launch, and each device runs its launches in order.
        """
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1
        if request.table is not None:
            self.kv.release(request.table)
            request.table = None
        request.num_computed = 0

    def schedule(self, preempt: Callable[[Request], None]) -> StepPlan | None:
        """Composes the next step and advances the requests' launch clocks; None if there is nothing to do.

        Args:
            preempt: called with each request that loses its KV here; it must call :meth:`remove`.
        """
        decodes = self._schedule_decodes(preempt)
        budget = self.limits.tile_budget - round_up_to_tile(len(decodes))
        prefills = self._schedule_prefills(budget)
        if not decodes and not prefills:
            return None
        return StepPlan(self.group, tuple(decodes), tuple(prefills))

    def _schedule_decodes(self, preempt: Callable[[Request], None]) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for request in list(self.running):
            if request.state is not RequestState.RUNNING or request.slot < 0 or not _decodes(request):
                continue
            if len(rows) == self.limits.tile_budget:
                break
            while not self._grow(request, request.num_tokens):
                victim = self.running[-1]
                preempt(victim)
                if victim is request:
                    break
            else:
                rows.append(_launch(request, 1))
        return rows

    def _schedule_prefills(self, budget: int) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for request in self.running:
            if budget <= 0:
                break
            if request.will_sample_no_more or _decodes(request) or request.num_uncomputed == 0:
                continue
            count = min(request.num_uncomputed, budget)
            rows.append(_launch(request, count))
            budget -= round_up_to_tile(count)
        return rows

    def _grow(self, request: Request, tokens: int) -> bool:
        assert request.table is not None
        return self.kv.grow(request.table, tokens)

    def _decode_reserve(self) -> int:
        """Free blocks a device kept back at admission, so that running requests are not preempted at once."""
        if not self.running:
            return 0
        return min(len(self.running), max(1, self.kv.spec.num_blocks // 100))


def _decodes(request: Request) -> bool:
    """The next step of this request is a single token that needs no prompt scores."""
    return request.num_uncomputed == 1 and not request.will_sample_no_more and not _scores(request)


def _scores(request: Request) -> bool:
    return request.params.prompt_logprobs and request.num_computed < len(request.prompt_ids)


def _launch(request: Request, count: int) -> ScheduledRow:
    """Advances the launch clock by ``count`` positions."""
    start, scores = request.num_computed, _scores(request)
    request.num_computed += count
    samples = request.num_uncomputed == 0
    if samples:
        request.num_pending += 1
    return ScheduledRow(request, start, count, samples, scores, request.slot)
