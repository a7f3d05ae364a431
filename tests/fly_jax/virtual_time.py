"""The real engine, scheduler and policy under a virtual clock, with modelled step times."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.device.buckets import Buckets
from fly_jax.kv.slabs import PackedRelayout, relayout_splits
from fly_jax.layout import DeviceGroup, all_groups
from fly_jax.outputs import RequestDelta
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.launch import ExecutableKey, Launch, StepKind, Work
from fly_jax.scheduling.results import StepResults
from fly_jax.scheduling.runner import StepInFlight
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.simulated_runner import SimulatedRunner, sampled_results, simulated_engine

HOST_SECONDS = 2e-4
MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 512


@dataclass(frozen=True)
class ModelledTimes:
    """Seconds of a step: reading the weights, computing each token, and the all-reduces of a group wider than one.

    Shaped like an 8B model on H200s: a wide group answers a few requests sooner, many narrow ones compute more.
    """

    weights: float = 6.0e-3
    token: float = 4.0e-5
    all_reduce: float = 4.0e-4
    all_reduce_token: float = 2.0e-5
    relayout: float = 2.0e-4

    def step(self, tp: int, tokens: int) -> float:
        shared = (self.weights + self.token * tokens) / tp
        return shared + (self.all_reduce + self.all_reduce_token * tokens if tp > 1 else 0.0)

    def table(self, num_devices: int, base_tp: int) -> dict[ExecutableKey, float]:
        """What a warm-up would measure."""
        seconds: dict[ExecutableKey, float] = {}
        for group in all_groups(num_devices, base_tp):
            buckets = Buckets.of(MAX_NUM_SEQS * group.num_devices // base_tp, MAX_NUM_BATCHED_TOKENS)
            for rows in buckets.rows:
                seconds[ExecutableKey(group, StepKind.DECODE, rows)] = self.step(group.tp, rows)
                seconds[ExecutableKey(group, StepKind.HEAD, rows)] = 0.0
            for tokens in buckets.tokens:
                seconds[ExecutableKey(group, StepKind.MIXED, tokens)] = self.step(group.tp, tokens)
            for splits in relayout_splits(group, base_tp):
                seconds[ExecutableKey(group, StepKind.RELAYOUT, 16, splits)] = self.relayout
        return seconds


class VirtualClock:
    """Seconds that pass only when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        self.now = max(self.now, time)


@dataclass(eq=False, frozen=True)
class TimedStep:
    """A step whose results are there at a certain time."""

    clock: VirtualClock
    done_at: float
    samples: int

    @property
    def ready(self) -> bool:
        return self.clock.now >= self.done_at

    def results(self) -> StepResults:
        self.clock.advance_to(self.done_at)
        return StepResults(sampled_results([1] * self.samples))


class TimedRunner(SimulatedRunner):
    """Each device runs its launches one after the other; a group's launch starts when all of its devices are free.

    Keeps no KV, unlike its base: these simulations are about time, and have many times the traffic.
    """

    chunk_slabs = 16
    clock: VirtualClock
    times: ModelledTimes

    def start(self, clock: VirtualClock, times: ModelledTimes, num_devices: int) -> None:
        self.clock, self.times = clock, times
        self._busy_until = [0.0] * num_devices

    def pack(self, plan: StepPlan) -> Launch:
        launch = Launch(self.shapes.key_of(plan), {}, Work.of(plan))
        self.on_pack(plan, launch)
        return launch

    def execute(self, launch: Launch) -> StepInFlight:
        seconds = self.times.step(launch.key.group.tp, launch.work.tokens)
        return TimedStep(self.clock, self._occupy(launch.key.group, seconds), launch.work.samples)

    def relayout(self, packed: PackedRelayout) -> None:
        self._occupy(packed.group, len(packed.uploads) * self.times.relayout)

    def wait_for_any(self, steps: Collection[StepInFlight]) -> None:
        self.clock.advance_to(min(step.done_at for step in steps if isinstance(step, TimedStep)))

    def _occupy(self, group: DeviceGroup, seconds: float) -> float:
        start = max(self.clock.now, *(self._busy_until[device] for device in group.device_indices))
        for device in group.device_indices:
            self._busy_until[device] = start + seconds
        return start + seconds


@dataclass(frozen=True)
class Arrival:
    """A request of a workload."""

    at: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    width: int | None = None


@dataclass(frozen=True)
class Sample:
    """The engine after one step."""

    time: float
    layout: str
    running: int
    waiting: int


class Simulation:
    """An engine that serves a list of arrivals in virtual time.

    Attributes:
        samples: one a step.
        deltas: (time, delta) in order.
    """

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        *,
        num_devices: int = 4,
        times: ModelledTimes | None = None,
        on_step: Callable[[Simulation], None] = lambda _: None,
        **options: Any,
    ) -> None:
        self.clock, self._on_step = VirtualClock(), on_step
        self.samples: list[Sample] = []
        self.deltas: list[tuple[float, RequestDelta]] = []
        times = times or ModelledTimes()
        defaults: dict[str, Any] = {
            "layout": "1" + "+1" * (num_devices - 1),
            "policy": "auto",
            "num_blocks": 512,
            "block_size": 16,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "max_model_len": 4096,
        }
        self.engine, self.runner = simulated_engine(
            num_devices=num_devices,
            clock=self.clock,
            runner_type=TimedRunner,
            step_seconds=times.table(num_devices, options.get("base_tp", 1)),
            **{**defaults, **options},
        )
        assert isinstance(self.runner, TimedRunner)
        self.runner.start(self.clock, times, num_devices)
        self._names = itertools.count()
        self._arrivals = [(arrival.at, index, arrival) for index, arrival in enumerate(arrivals)]
        heapq.heapify(self._arrivals)

    @property
    def engine_layout(self) -> str:
        return str(self.engine.layout)

    def run(self, until: float = float("inf"), max_steps: int = 200_000) -> None:
        """Serves until nothing is left to do or the time has come."""
        for _ in range(max_steps):
            self._take_arrivals()
            if self.clock.now >= until or not (self.engine.has_work or self._arrivals):
                return
            if not self.engine.has_work:
                self.clock.advance_to(self._arrivals[0][0])
                continue
            self.clock.now += HOST_SECONDS
            self.deltas += [(self.clock.now, delta) for delta in self.engine.step()]
            scheduler = self.engine.scheduler
            self.samples.append(
                Sample(self.clock.now, self.engine_layout, scheduler.num_running, len(scheduler.waiting))
            )
            self._on_step(self)
        raise AssertionError(f"not finished after {max_steps} steps at {self.clock.now:.2f} s")

    def _take_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now:
            arrival = heapq.heappop(self._arrivals)[2]
            name = f"r{next(self._names)}"
            params = SamplingParams(
                max_tokens=arrival.output_tokens,
                ignore_eos=True,
                priority=arrival.priority,
                tensor_parallel_size=arrival.width,
            )
            self.engine.add_request(name, [1 + len(name) % 60] * arrival.prompt_tokens, params)
