"""What a layout policy sees: the requests, the groups and the machine, as plain values. No JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.scheduling.step import SchedulerLimits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step by TP degree, measured at warm-up, for the bucket sizes that are compiled.

    Attributes:
        decode: degree -> {most requests: seconds} of a step of one token a request, sampling included.
        mixed: degree -> {most token places: seconds} of a step with prompt chunks, sampling included.
        relayout: degree of the wider group -> seconds of one relayout launch.
    """

    decode: Mapping[int, Mapping[int, float]]
    mixed: Mapping[int, Mapping[int, float]]
    relayout: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while the engine runs.

    Attributes:
        groups: those with compiled programs; only layouts made of them can be switched to.
    """

    num_devices: int
    base_tp: int
    groups: frozenset[DeviceGroup]
    kv: KVCacheSpec
    limits: SchedulerLimits
    step_times: StepTimes


class RequestLoad(NamedTuple):
    """One request. A named tuple: hundreds are made for every decision, in a quarter of a frozen dataclass's time.

    Attributes:
        tokens: prompt and output so far.
        uncomputed: tokens whose KV is still to be computed (the prompt of a waiting request).
        limit: most tokens it may come to hold.
        min_width: TP degree that it asks for; 1 if it does not.
        priority: lower runs first; 0 is normal.
        holder: the group that a paused request's KV waits for; a running one's is the group it runs in.
    """

    tokens: int
    uncomputed: int
    limit: int
    min_width: int = 1
    priority: int = 0
    holder: DeviceGroup | None = None


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group of the layout in force.

    Attributes:
        free_blocks: KV blocks that every device of the group still has.
    """

    group: DeviceGroup
    running: tuple[RequestLoad, ...]
    free_blocks: int


@dataclass(frozen=True, slots=True)
class Load:
    """Everything that a decision is a function of, besides the machine.

    Attributes:
        now: seconds on the engine's clock, real or virtual.
        groups: in device order; they make up ``layout``.
        waiting: in queue order; of a long queue, its head.
        paused: requests whose KV waits for its group (hard preempt).
        prompt_rate, output_rate: prompt tokens that arrive and output tokens that they ask for, per second.
        last_switch: when the layout changed last; None if it never did.
    """

    now: float
    layout: Layout
    groups: tuple[GroupLoad, ...]
    waiting: tuple[RequestLoad, ...] = ()
    paused: tuple[RequestLoad, ...] = ()
    prompt_rate: float = 0.0
    output_rate: float = 0.0
    last_switch: float | None = None

    def requests(self) -> Iterator[tuple[RequestLoad, DeviceGroup | None]]:
        """Every request, with the devices that hold its KV."""
        for group in self.groups:
            for request in group.running:
                yield request, group.group
        for request in self.paused:
            yield request, request.holder
        for request in self.waiting:
            yield request, None
