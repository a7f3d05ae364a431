"""Thousands of random operations on simulated engines of every shape, with groups that run at different speeds."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from fly_jax.outputs import SwitchStrategy
from tests.fly_jax.simulated_runner import VOCABULARY
from tests.fly_jax.traffic import Traffic, layouts


class Storm:
    """Operations drawn from a seed. What it did is printed, so that pytest shows it when something does not hold.

    Every step makes the results of each group reach the host with a probability of its own: some groups lag far
    behind others, up to what the engine lets them.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.options = self._options()
        print(f"seed {seed}: {self.options}")
        self.traffic = Traffic(**self.options)
        self.speeds = {device: self.random.choice((0.05, 0.3, 0.9)) for device in range(4)}
        self.operations = {
            self.add: 10,
            self.add_long: 4,
            self.add_urgent: 3,
            self.burst: 4,
            self.abort: 3,
            self.switch: 6,
            self.pause_and_come_back: 2,
            self.step: 6,
        }

    def run(self, operations: int) -> Counter[str]:
        """Carries out operations, then ends; what has been seen on the way."""
        choices, weights = list(self.operations), list(self.operations.values())
        for operation in self.random.choices(choices, weights, k=operations):
            if len(self.traffic.live) > 60:
                operation = self.step
            operation()
            self.traffic.check()
            self._step(self.random.randint(0, 2))
        self.traffic.finish()
        return self.traffic.seen

    def _options(self) -> dict[str, Any]:
        pick = self.random.choice
        base_tp, max_num_seqs = pick((1, 1, 1, 2)), pick((1, 2, 4, 8))
        return {
            "base_tp": base_tp,
            "layout": pick(layouts(base_tp)),
            "num_blocks": pick((4, 8, 16, 32)),
            "block_size": pick((2, 4, 8)),
            "kv_heads": pick((1, 2, 4, 4)),
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + pick((32, 48, 64)),
            "max_model_len": pick((64, 250, 250, 250)),
            "max_queued": pick((4, 100, 100, 100)),
            "patience": pick((3, 20, 512, 512)),
            "overlap": pick((True, True, False)),
            "instant": False,
        }

    # -- operations -------------------------------------------------------------------------------------------

    def add(self) -> None:
        self._send(self.random.randint(1, 12))

    def add_long(self) -> None:
        """A prompt that only the wider groups hold."""
        spec = self.traffic.kv.spec
        self._send(self.random.randint(spec.capacity_tokens(1) // 2, spec.capacity_tokens(2) + 8))

    def add_urgent(self) -> None:
        widest = (self.traffic.switcher.target or self.traffic.engine.layout).widest
        priority, width = self.random.choice(((-1, None), (-2, widest), (0, widest), (1, None), (1, 2)))
        self._send(self.random.randint(1, 30), priority=priority, tensor_parallel_size=width)

    def burst(self) -> None:
        for _ in range(self.random.randint(3, 10)):
            self.add()

    def abort(self) -> None:
        paused = self.traffic.scheduler.paused
        choices = paused if paused and self.random.random() < 0.5 else self.traffic.live
        if choices:
            name = self.random.choice(choices).request_id
            print("abort", name)
            self.traffic.abort(name)

    def switch(self) -> None:
        target, strategy = (
            self.random.choice(layouts(self.traffic.kv.base_tp)),
            self.random.choice(list(SwitchStrategy)),
        )
        print("switch", target, strategy)
        self.traffic.switch(target, strategy)

    def pause_and_come_back(self) -> None:
        source = str(self.traffic.engine.layout)
        target = self.random.choice(layouts(self.traffic.kv.base_tp))
        print("pause", target, "and come back")
        for layout in (target, source):
            self.traffic.switch(layout, SwitchStrategy.HARD_PREEMPT)
            self.add()
            self._step(self.random.randint(0, 3))

    def step(self) -> None:
        self._step(self.random.randint(1, 20))

    def _send(self, tokens: int, **params: Any) -> None:
        prompt = [self.random.randrange(1, VOCABULARY) for _ in range(tokens)]
        max_tokens = self.random.choice((1, 20, 60, 100, None))
        scored = 0 if self.random.random() < 0.1 else None
        request = self.traffic.add(
            prompt,
            max_tokens=max_tokens,
            ignore_eos=self.random.random() < 0.8,
            prompt_logprobs=scored,
            **params,
        )
        print("add", request and request.request_id, tokens, max_tokens, params)

    def _step(self, times: int) -> None:
        for _ in range(times):
            for step in self.traffic.runner.unread:
                step.ready = step.ready or self.random.random() < self.speeds[step.plan.group.start]
            if self.traffic.engine.has_work:
                self.traffic.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_nothing_leaks_deadlocks_or_goes_wrong_in_a_storm(seed: int) -> None:
    Storm(seed).run(operations=200)


@pytest.mark.slow
def test_a_storm_does_all_that_it_should() -> None:
    """Otherwise the storms above would show nothing."""
    seen: Counter[str] = Counter()
    for seed in range(100, 112):
        seen += Storm(seed).run(operations=80)
    for what in (
        *(f"a {strategy} switch" for strategy in SwitchStrategy),
        *(f"a {strategy} switch with requests in flight" for strategy in ("migrate", "hard_preempt")),
        *(f"a {state} request is aborted" for state in ("waiting", "running", "paused")),
        "steps with blocks taken ahead",
        "a migration copies ahead",
        "a request is displaced",
        "a request is refused",
        "a request is resumed in place",
        "a switch is refused",
    ):
        assert seen[what], f"never: {what}; {seen}"


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_twenty_thousand_operations(seed: int) -> None:
    Storm(seed).run(operations=500)
