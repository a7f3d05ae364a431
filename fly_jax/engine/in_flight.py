"""Steps that are launched and not read yet."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.results import RowResult, read_results
from fly_jax.scheduling.runner import STEPS_IN_FLIGHT, Runner, StepInFlight
from fly_jax.scheduling.step import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """
    Attributes:
        number: of the launch.
    """

    plan: StepPlan
    step: StepInFlight
    number: int

    def read(self) -> list[RowResult]:
        """Waits for the step and reads what its rows produced.

        Raises:
            RuntimeError: the device program failed.
        """
        return read_results(self.plan, self.step.results())


class StepsInFlight:
    """Launches steps and hands them out when they can be read.

    Args:
        overlap: a group may have a step in flight while its next is prepared.
        number: counts a launch of a group.
    """

    def __init__(self, runner: Runner, *, overlap: bool, number: Callable[[DeviceGroup], int]) -> None:
        self.runner, self.overlap = runner, overlap
        self._number = number
        self._steps: deque[LaunchedStep] = deque()  # in order of launch

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def groups(self) -> set[DeviceGroup]:
        return {each.plan.group for each in self._steps}

    @property
    def full_groups(self) -> set[DeviceGroup]:
        """Those that may not launch another step yet."""
        most = STEPS_IN_FLIGHT if self.overlap else 1
        return {group for group, count in Counter(each.plan.group for each in self._steps).items() if count >= most}

    def launch(self, plan: StepPlan) -> None:
        step = self.runner.execute(self.runner.pack(plan))
        self._steps.append(LaunchedStep(plan, step, self._number(plan.group)))

    def take_ready(self, *, block: bool) -> list[LaunchedStep]:
        """Takes the steps whose results can be read; waits until one can if ``block``.

        A step is not read before an older one of the same request: after a switch its tokens come from steps of
        several groups, which may share no device, and their order is the text's.
        """
        ready = self._readable()
        if not ready and block and self._steps:
            if len(self.groups) > 1:
                self.runner.wait_for_any([each.step for each in self._steps])
                ready = self._readable()
            ready = ready or [self._steps[0]]
        for each in ready:
            self._steps.remove(each)
        return ready

    def _readable(self) -> list[LaunchedStep]:
        ready: list[LaunchedStep] = []
        blocked: set[Request] = set()
        for each in self._steps:
            requests = [row.request for row in each.plan.rows]
            if blocked.isdisjoint(requests) and (not self.overlap or each.step.ready):
                ready.append(each)
            else:
                blocked.update(requests)
        return ready
