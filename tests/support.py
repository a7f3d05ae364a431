"""What tests of the running engine share."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fly_jax import LLM, EngineConfig, SamplingParams
from fly_jax.device.runner import ModelRunner
from fly_jax.engine.engine import Engine
from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup
from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.results import read_results
from fly_jax.scheduling.step import ScheduledRow, StepPlan

# One bucket of each kind: as few compiles as an engine can have.
SMALL: dict[str, Any] = {"policy": "static", "max_num_seqs": 4, "max_num_batched_tokens": 128, "optimization_level": 0}


def small_config(folder: Path, **options: Any) -> EngineConfig:
    """Options of an engine with few programs, in float32 on four devices."""
    return EngineConfig(model=folder, **{"devices": 4, "dtype": "float32", **SMALL, **options})


def small_llm(folder: Path, **options: Any) -> LLM:
    """An engine with few programs, in float32 on four devices."""
    return LLM(folder, **{"devices": 4, "dtype": "float32", "progress": False, **SMALL, **options})


def migrated_through(engine: Engine, layouts: Sequence[str], *, every: int) -> dict[str, list[TokenLogprob]]:
    """Serves what an engine has to do and switches the layout after so many steps.

    Returns:
        Every scored prompt token and every generated one, by request.
    """
    found: dict[str, list[TokenLogprob]] = defaultdict(list)
    to_come, steps = list(layouts), 0
    while engine.has_work:
        steps += 1
        if steps % every == 0 and to_come:
            engine.begin_switch(to_come.pop(0), SwitchStrategy.MIGRATE)
        for delta in engine.step():
            assert delta.error is None
            found[delta.request_id] += [*(delta.prompt_logprobs or ()), *delta.logprobs]
    assert not to_come
    return found


def score_on_group(runner: ModelRunner, group: DeviceGroup, token_ids: Sequence[int]) -> np.ndarray:
    """Teacher-forced log-probabilities through one group's prefill programs alone, float32 ``[len(token_ids) - 1]``."""
    manager = KVCacheManager(runner.shapes.kv, len(runner.meshes.devices), runner.meshes.base_tp)
    request = Request("score", tuple(token_ids), SamplingParams(prompt_logprobs=0), limit=1, seed=0, arrival=0.0)
    request.table = manager.new_table(group)
    assert manager.grow(request.table, len(token_ids))
    scores: list[float] = []
    chunk = runner.shapes.buckets(group.tp).tokens[-1]
    for start in range(0, len(token_ids) - 1, chunk):
        count = min(chunk, len(token_ids) - 1 - start)
        row = ScheduledRow(request, start, count, samples=False, scores=True, slot=0)
        plan = StepPlan(group, (), (row,))
        (result,) = read_results(plan, runner.execute(runner.pack(plan)).results())
        assert result.scores is not None
        scores.extend(result.scores.logprobs)
    return np.asarray(scores, np.float32)


def wait_until_running(llm: LLM, timeout: float = 120.0) -> None:
    """Returns once a request runs; another thread sends them."""
    deadline = time.monotonic() + timeout
    while llm.stats().running == 0:
        assert time.monotonic() < deadline, "no request came to run"
        time.sleep(0.001)
