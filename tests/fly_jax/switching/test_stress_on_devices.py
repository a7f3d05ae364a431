"""Thousands of random operations on a real tiny model: nothing hangs, leaks, compiles or says a wrong token.

The oracle is the same model in a layout that never switches. Every request is one of a few tasks that the oracle has
answered before; wherever it ran, what it said must be the beginning of that answer.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_jax.engine.loader import LoadedModel, load_model
from fly_jax.errors import FlyJaxError
from fly_jax.outputs import FinishReason, RequestDelta, SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request
from tests.fly_jax.invariants import check_blocks, check_running
from tests.fly_jax.traffic import layouts
from tests.support import small_config
from tests.tiny_models import CASES, random_token_ids, write_model
from tests.watchdog import watched

TOLERANCE = 2e-4  # float32, sums in another order at each degree
BLOCKS, BLOCK_SIZE = 24, 4
ONE_DEVICE = BLOCKS * BLOCK_SIZE
SHORT, LONG = (1, 5, 16, 17, 31, 40), (70, 100, 130, 170)  # tokens; the long ones fit no single device to their end
MOST_LIVE = 40


@dataclass(frozen=True)
class Task:
    """A prompt and how it is sampled."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: RequestDelta) -> None:
        assert delta.error is None
        assert self.finish_reason is None, "a delta after the last one"
        self.tokens += delta.token_ids
        self.logprobs += [token.logprob for token in delta.logprobs]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs.logprobs.tolist()
        self.finish_reason = delta.finish_reason


def make_task(index: int, length: int) -> Task:
    """Every other one is sampled, with a seed of its own; every fifth is scored."""
    sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0.0}
    params = SamplingParams(
        max_tokens=120, ignore_eos=True, logprobs=0, prompt_logprobs=None if index % 5 else 0, **sampled
    )
    return Task(tuple(random_token_ids(length, 256, seed=index)), params)


TASKS = tuple(make_task(index, length) for index, length in enumerate((*SHORT, *LONG) * 3))


@dataclass(frozen=True)
class Oracle:
    """A loaded model, and what it answers in a layout that never switches."""

    model: LoadedModel
    answers: dict[Task, Answer]


# As many KV heads as devices; and fewer, so that groups of four keep copies.
@pytest.fixture(scope="module", params=[4, 2], ids=["4 heads", "2 heads"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder: Path = tmp_path_factory.mktemp("tiny")
    case = {**CASES["llama_mha"], "max_position_embeddings": 512, "num_key_value_heads": request.param}
    write_model(folder, case)
    options: dict[str, Any] = {"num_blocks": BLOCKS, "block_size": BLOCK_SIZE, "scheduling_policy": "priority"}
    model = load_model(small_config(folder, layout="4", **options))
    engine, answers = model.engine(), {each: Answer() for each in TASKS}
    for index, each in enumerate(TASKS):
        engine.add_request(str(index), each.prompt, each.params)
    while engine.has_work:
        for delta in engine.step():
            answers[TASKS[int(delta.request_id)]].add(delta)
    assert engine.control.log.count.total() == 0
    return Oracle(model, answers)


class Storm:
    """Operations drawn from a seed, on an engine that is stepped by hand, so that a seed gives the same run again.

    Attributes:
        done: operations and steps so far, which a watchdog looks at.
        seen: what has happened.
    """

    def __init__(self, oracle: Oracle, seed: int) -> None:
        self.random = random.Random(seed)
        self.oracle, self.engine = oracle, oracle.model.engine()
        self.accepted: dict[str, tuple[Task, Request]] = {}
        self.answers: dict[str, Answer] = defaultdict(Answer)
        self.seen: Counter[str] = Counter()
        self.done = 0
        self._operations = {
            self.admit: 8,
            self.admit_long: 5,
            self.admit_favoured: 4,
            self.cancel: 3,
            self.switch: 6,
            self.set_policy: 1,
            self.step: 4,
        }

    def run(self, operations: int) -> Counter[str]:
        for operation in self.random.choices(list(self._operations), list(self._operations.values()), k=operations):
            (self.step if len(self.engine.scheduler.requests) > MOST_LIVE else operation)()
            self._check()
            self._steps(self.random.randint(0, 2))
        while self.engine.has_work:
            self._steps(1)
        self._check_end()
        return self.seen

    # -- operations -------------------------------------------------------------------------------------------

    def admit(self) -> None:
        self._send(SHORT)

    def admit_long(self) -> None:
        self._send(LONG)

    def admit_favoured(self) -> None:
        priority, width = self.random.choice(((-1, None), (-2, 4), (0, 2), (0, 4), (1, None)))
        self._send((*SHORT, *LONG), priority=priority, tensor_parallel_size=width)

    def cancel(self) -> None:
        by_state: dict[str, list[str]] = defaultdict(list)
        for name, request in self.engine.scheduler.requests.items():
            by_state[request.state.name].append(name)
        if by_state:
            # Most requests wait, so a state first: running ones might not be met in a thousand operations.
            state = self.random.choice(sorted(by_state))
            name = self.random.choice(by_state[state])
            self.seen[f"cancel {state}"] += 1
            if self.engine.switching:
                self.seen["cancel in mid-switch"] += 1
            delta = self.engine.abort(name)
            assert delta is not None
            self.answers[name].add(delta)

    def switch(self) -> None:
        target = self.random.choice(layouts())
        strategy = self.random.choice([*SwitchStrategy, SwitchStrategy.MIGRATE, SwitchStrategy.HARD_PREEMPT])
        self._try(lambda: self.engine.begin_switch(target, strategy), f"switch {strategy}")

    def set_policy(self) -> None:
        policy = self.random.choice(("auto", "static"))
        self._try(lambda: self.engine.set_policy(policy), f"policy {policy}")

    def step(self) -> None:
        self._steps(self.random.randint(1, 12))

    def _send(self, lengths: tuple[int, ...], **changes: Any) -> None:
        name = f"r{len(self.accepted)}"
        each = self.random.choice([each for each in TASKS if len(each.prompt) in lengths])
        params = dataclasses.replace(each.params, max_tokens=self.random.choice((1, 10, 40, 120)), **changes)

        def send() -> None:
            self.engine.add_request(name, each.prompt, params)
            self.accepted[name] = each, self.engine.scheduler.requests[name]

        self._try(send, "admit")

    def _try(self, operation: Any, what: str) -> None:
        """An operation that may be refused, with an error that says what is wrong and what to do."""
        try:
            operation()
        except FlyJaxError as error:
            self.seen[f"{what} refused"] += 1
            self.seen["refused without a way out"] += ":" not in str(error)
        else:
            self.seen[what] += 1

    def _steps(self, times: int) -> None:
        for _ in range(times):
            self.done += 1
            if self.engine.has_work:
                for delta in self.engine.step():
                    self.answers[delta.request_id].add(delta)

    # -- what must hold ---------------------------------------------------------------------------------------

    def _check(self) -> None:
        check_blocks(self.engine)
        check_running(self.engine.scheduler)

    def _check_end(self) -> None:
        stats = self.engine.stats()
        assert self.seen["refused without a way out"] == 0
        assert stats.compiles_after_warmup == 0
        assert stats.free_blocks == (stats.num_blocks,) * 4
        assert (stats.running, stats.paused, stats.waiting) == (0, 0, 0)
        assert set(self.answers) == set(self.accepted)
        for name, (each, request) in self.accepted.items():
            self._check_answer(name, request, self.answers[name], self.oracle.answers[each])
        self.seen["KV bytes moved"] += stats.switch_kv_bytes_moved
        self.seen["paused"] += sum(report.requests_paused for report in stats.switch_history)
        self.seen["preempted"] += stats.preemptions

    def _check_answer(self, name: str, request: Request, got: Answer, expected: Answer) -> None:
        count = len(got.tokens)
        assert got.tokens == expected.tokens[:count], name
        np.testing.assert_allclose(got.logprobs, expected.logprobs[:count], atol=TOLERANCE, rtol=0, err_msg=name)
        if got.finish_reason is FinishReason.LENGTH:
            assert count == request.max_tokens, name
            np.testing.assert_allclose(
                got.prompt_logprobs, expected.prompt_logprobs, atol=TOLERANCE, rtol=0, err_msg=name
            )
        else:
            assert got.finish_reason is FinishReason.ABORT, name


# Which step a switch comes at depends on how fast the devices are, so only what happens often is asked for; the storms
# on the simulated runner ask for the rest.
WORTH_SEEING = (
    *(f"switch {strategy}" for strategy in SwitchStrategy),
    *("admit", "admit refused", "cancel WAITING", "cancel RUNNING", "cancel in mid-switch"),
    *("policy auto", "policy static", "KV bytes moved", "paused", "preempted"),
)


def storm(oracle: Oracle, seed: int, operations: int) -> Counter[str]:
    each = Storm(oracle, seed)
    return watched(lambda: each.run(operations), progress=lambda: each.done)


@pytest.mark.slow
def test_a_thousand_operations_of_every_kind_change_no_token(oracle: Oracle) -> None:
    """Two thousand in all: once with every head count."""
    seen = storm(oracle, seed=1, operations=1000)
    assert [what for what in WORTH_SEEING if not seen[what]] == []


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(2000, 2010))
def test_twenty_thousand_operations_change_no_token(oracle: Oracle, seed: int) -> None:
    storm(oracle, seed, operations=1000)
