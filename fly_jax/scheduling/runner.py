"""The seam between who decides and what computes: the real runner and its stand-ins. No JAX."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fly_jax.kv.slabs import KVMover
from fly_jax.scheduling.launch import ExecutableKey, Launch
from fly_jax.scheduling.results import StepResults
from fly_jax.scheduling.step import StepPlan

# Steps of one group that may be launched and not yet read: one runs while the next is prepared.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What does not change once a runner serves.

    Attributes:
        programs: how many are compiled.
        compile_seconds: wall time of lowering and compiling them.
        step_seconds: of each program, measured at warm-up.
        weight_bytes, kv_bytes: resident, on all devices together.
    """

    programs: int = 0
    compile_seconds: float = 0.0
    step_seconds: Mapping[ExecutableKey, float] = field(default_factory=dict)
    weight_bytes: int = 0
    kv_bytes: int = 0


class StepInFlight(Protocol):
    """A launch that has been executed and whose results are on their way to the host."""

    @property
    def ready(self) -> bool:
        """:meth:`results` would not wait."""

    def results(self) -> StepResults:
        """Waits for the step.

        Raises:
            RuntimeError: the device program failed.
        """


class Runner(KVMover, Protocol):
    """What steps run on. Launches, relayouts included, take effect in the order in which they are given."""

    @property
    def info(self) -> RunnerInfo: ...

    @property
    def compiles(self) -> int:
        """Programs that this process has compiled so far; none may follow the warm-up."""

    def pack(self, plan: StepPlan) -> Launch:
        """Makes a step ready as plain data. Only what the plan says now goes into it."""

    def execute(self, launch: Launch) -> StepInFlight:
        """Starts a step and returns without waiting for it."""

    def wait_for_any(self, steps: Collection[StepInFlight]) -> None:
        """Waits until one of the steps, of several groups, is ready, so that a slow one does not hold up the others."""
