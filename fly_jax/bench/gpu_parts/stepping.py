"""An engine on one device, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_jax.bench.prompts import Prompt
from fly_jax.config import EngineConfig
from fly_jax.device.runner import ModelRunner
from fly_jax.engine.engine import Engine
from fly_jax.engine.loader import LoadedModel, load_model
from fly_jax.errors import FlyJaxError
from fly_jax.outputs import RequestDelta
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.results import StepResults
from fly_jax.scheduling.runner import StepInFlight


def load_on_one_device(model: Path, **options: Any) -> LoadedModel:
    """
    Raises:
        ConfigError, CheckpointError, ModelTooLargeError, CompileError: one line that says what to do.
    """
    only_layout: dict[str, Any] = {"devices": 1, "layout": "1", "layouts": ("1",), "policy": "static"}
    return load_model(EngineConfig(model=model, **only_layout, **options))


def add(engine: Engine, prompts: Iterable[Prompt], params: SamplingParams) -> None:
    """Queues one request a prompt of token ids, named by its index."""
    for index, prompt in enumerate(prompts):
        assert not isinstance(prompt, str)
        engine.add_request(str(index), prompt, params, bounded=False)


def step(engine: Engine) -> list[RequestDelta]:
    """
    Raises:
        FlyJaxError: a request failed.
    """
    deltas = engine.step()
    for delta in deltas:
        if delta.error is not None:
            raise FlyJaxError(f"request {delta.request_id} failed: {delta.error}")
    return deltas


def drain(engine: Engine) -> None:
    """Steps until every request has ended.

    Raises:
        FlyJaxError: a request failed.
    """
    while engine.has_work:
        step(engine)


class WaitTimer(ModelRunner):
    """A runner that adds up how long the host waited for devices.

    Attributes:
        waited: seconds.
        steps: that were read.
    """

    def __init__(self, runner: ModelRunner) -> None:
        parts = (runner.shapes, runner.meshes, runner.weights, runner.pool, runner.executables, runner.compile_counter)
        super().__init__(*parts)
        self.waited, self.steps = 0.0, 0

    def execute(self, launch: Launch) -> StepInFlight:
        return _TimedStep(super().execute(launch), self)


@dataclass(frozen=True, slots=True)
class _TimedStep:
    step: StepInFlight
    timer: WaitTimer

    @property
    def ready(self) -> bool:
        return self.step.ready

    def results(self) -> StepResults:
        started = time.perf_counter()
        results = self.step.results()
        self.timer.waited += time.perf_counter() - started
        self.timer.steps += 1
        return results
