"""Random traffic, preemption and switches through the real engine over a simulated runner, shrunk when they fail."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fly_jax.outputs import SwitchStrategy
from tests.fly_jax.simulated_runner import VOCABULARY
from tests.fly_jax.traffic import Traffic, layouts


@st.composite
def _engines(draw: st.DrawFn) -> dict[str, Any]:
    base_tp = draw(st.sampled_from((1, 1, 2)))
    max_num_seqs = draw(st.integers(1, 6))
    budgets = [tokens for tokens in (32, 48, 64) if tokens >= max_num_seqs + 32 or max_num_seqs == 1]
    return {
        "base_tp": base_tp,
        "layout": draw(st.sampled_from(layouts(base_tp))),
        "num_blocks": draw(st.integers(3, 10)),
        "block_size": draw(st.sampled_from((2, 4, 8))),
        "kv_heads": draw(st.sampled_from((1, 2, 4))),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.sampled_from(budgets)),
        "max_model_len": draw(st.sampled_from((24, 100, 250))),
        "max_queued": draw(st.sampled_from((2, 100))),
        "patience": draw(st.sampled_from((3, 20, 512))),
        "overlap": draw(st.booleans()),
        "instant": draw(st.booleans()),
    }


def _prompt(data: bytes) -> list[int]:
    return [1 + byte % (VOCABULARY - 1) for byte in data]


class EngineMachine(RuleBasedStateMachine):
    """Traffic in any order; everything that must always hold is an invariant."""

    @initialize(options=_engines())
    def start(self, options: dict[str, Any]) -> None:
        self.traffic = Traffic(**options)
        self.aborts = 0

    @rule(
        prompt=st.integers(1, 60).flatmap(lambda n: st.binary(min_size=n, max_size=n)).map(_prompt),
        max_tokens=st.integers(1, 60) | st.none(),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from((None, 0)),
        priority=st.sampled_from((0, 0, 0, -1, 1)),
        width=st.sampled_from((None, None, None, 1, 2, 4)),
    )
    def add(self, prompt: list[int], width: int | None, **params: Any) -> None:
        self.traffic.add(prompt, tensor_parallel_size=width, **params)

    @rule(
        count=st.integers(3, 8),
        prompt_tokens=st.integers(1, 6),
        max_tokens=st.integers(20, 60),
        priority=st.sampled_from((0, 0, -1)),
    )
    def add_a_burst_that_outgrows_the_pools(
        self, count: int, prompt_tokens: int, max_tokens: int, priority: int
    ) -> None:
        for i in range(count):
            self.traffic.add(
                [1 + i] * prompt_tokens,
                max_tokens=max_tokens,
                ignore_eos=True,
                prompt_logprobs=0 if i == 0 else None,
                priority=priority,
            )

    @precondition(lambda self: self.traffic.live and 4 * self.aborts < len(self.traffic.accepted))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.aborts += 1
        self.traffic.abort(data.draw(st.sampled_from(sorted(self.traffic.scheduler.requests))))

    @precondition(lambda self: self.traffic.engine.has_work)
    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        self.traffic.step(times)

    @precondition(lambda self: self.traffic.runner.unread)
    @rule(data=st.data())
    def finish_a_step_on_its_device(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.traffic.runner.unread)).ready = True

    @rule(data=st.data(), strategy=st.sampled_from(SwitchStrategy))
    def switch(self, data: st.DataObject, strategy: SwitchStrategy) -> None:
        self.traffic.switch(data.draw(st.sampled_from(layouts(self.traffic.kv.base_tp))), strategy)

    @rule(data=st.data(), strategy=st.sampled_from(SwitchStrategy))
    def switch_and_step(self, data: st.DataObject, strategy: SwitchStrategy) -> None:
        self.switch(data, strategy)
        self.traffic.step()

    @invariant()
    def everything_holds(self) -> None:
        self.traffic.check()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.finish()
            for what in self.traffic.seen:
                event(what)


TestEngineMachine = pytest.mark.slow(EngineMachine.TestCase)
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=30)


class LongEngineMachine(EngineMachine):
    """The same for longer."""


TestLongEngineMachine = pytest.mark.stress(LongEngineMachine.TestCase)
TestLongEngineMachine.settings = settings(max_examples=1000, stateful_step_count=40)
