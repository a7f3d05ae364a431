"""One step of one group as plain data, and its bounds. Pure Python, no JAX."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.request import Request

# Prefill tokens are laid out in tiles of one request each; the attention of a tile shares its reads of the KV cache.
TILE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step of one group.

    Attributes:
        max_num_seqs: requests that a group of the base degree runs at once; wider groups run proportionally more.
        patience: scheduler passes after which somebody who waits or is paused comes before others.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    patience: int = 512

    def max_running(self, tp: int, base_tp: int) -> int:
        """Requests that one group runs at once: as many as its parts, so that all have places when they merge."""
        return max(1, self.max_num_seqs * tp // base_tp)

    def slots(self, num_devices: int, base_tp: int) -> int:
        """Most requests that are in the devices' token tables: those that run, and as many again that are paused."""
        return 2 * self.max_num_seqs * (num_devices // base_tp)

    def tile_budget(self, tp: int, base_tp: int) -> int:
        """The token budget of a step in whole tiles; decodes always leave it room for a chunk of a prompt."""
        least = round_up_to_tile(self.max_running(tp, base_tp)) + TILE_TOKENS
        return max(least, self.max_num_batched_tokens // TILE_TOKENS * TILE_TOKENS)


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Positions ``start .. start + count - 1`` of one request, computed in one step.

    Attributes:
        samples: the last position is the request's newest, so a token is sampled after it.
        scores: prompt log-probabilities are wanted for these positions.
        slot: the request's column of the devices' token tables.
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
    def sampled(self) -> tuple[ScheduledRow, ...]:
        """Rows that sample a token, in the order of the head's rows."""
        return tuple(row for row in self.rows if row.samples)

    @property
    def places(self) -> list[int]:
        """First token place of each row: decodes come first, then every chunk in whole tiles of its own."""
        starts = list(range(len(self.decodes)))
        place = round_up_to_tile(len(self.decodes))
        for row in self.prefills:
            starts.append(place)
            place += round_up_to_tile(row.count)
        return starts

    @property
    def num_tiled_tokens(self) -> int:
        """Token places that the step needs when it holds prompt chunks."""
        return round_up_to_tile(len(self.decodes)) + sum(round_up_to_tile(row.count) for row in self.prefills)


def round_up_to_tile(tokens: int) -> int:
    return -(-tokens // TILE_TOKENS) * TILE_TOKENS


class SlotPool:
    """Columns of the devices' token tables. A request keeps its slot whatever group it moves to."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)
