"""A real runner whose launches are watched, logged or sent through bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fly_jax.device.device_arrays import DeviceArrays
from fly_jax.device.runner import ModelRunner
from fly_jax.kv.slabs import PackedRelayout
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.runner import StepInFlight
from fly_jax.scheduling.step import StepPlan


class WatchedRunner(ModelRunner):
    """Shares another runner's weights and programs, and its pool too unless it is ``fresh``.

    Attributes:
        plans: of the steps, in order.
        log: what was launched, in order, with the step in flight that came of it.
        on_pack: called with each plan and its launch.
        send: what becomes of a launch on its way to be executed.
    """

    def __init__(self, runner: ModelRunner, *, fresh: bool = False) -> None:
        pool = runner.pool
        if fresh:
            pool = DeviceArrays(pool.meshes, pool.device_shape, pool.dtype)
        parts = (runner.shapes, runner.meshes, runner.weights, pool, runner.executables, runner.compile_counter)
        super().__init__(*parts)
        self.plans: list[StepPlan] = []
        self.log: list[tuple[Launch, StepInFlight] | PackedRelayout] = []
        self.on_pack: Callable[[StepPlan, Launch], None] = lambda *_: None
        self.send: Callable[[Any], Any] = lambda launch: launch

    def pack(self, plan: StepPlan) -> Launch:
        launch = super().pack(plan)
        self.plans.append(plan)
        self.on_pack(plan, launch)
        return launch

    def execute(self, launch: Launch) -> StepInFlight:
        step = super().execute(self.send(launch))
        self.log.append((launch, step))
        return step

    def relayout(self, packed: PackedRelayout) -> None:
        super().relayout(self.send(packed))
        self.log.append(packed)
