"""Random sequences of switches on the real engine, with requests in flight: the tokens, log-probabilities and slots.

The engine is stepped by the test itself, so that every switch comes at a chosen step.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fly_jax.device.runner import ModelRunner
from fly_jax.engine.loader import LoadedModel, load_model
from fly_jax.layout import all_groups
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.slot_arithmetic import Upload
from tests.fly_jax.watched_runner import WatchedRunner
from tests.support import score_on_group, small_config
from tests.tiny_models import CASES, random_token_ids, write_model

pytestmark = pytest.mark.slow  # its engines

TOLERANCE = 2e-4  # float32, sums in another order at each degree
LENGTHS = (3, 17, 40, 64, 90, 120, 150, 8)
SCORED = random_token_ids(300, 256, seed=5)
UP_AND_DOWN = ("2+2", "1+1+1+1", "4", "1+1+1+1")
MIXED = ("4", "2+1+1", "1+1+1+1", "4", "1+1+2", "2+2")


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: Sequence[float] = ()


class Server:
    """An engine over the shared programs, stepped by hand."""

    def __init__(self, model: LoadedModel) -> None:
        self.runner = WatchedRunner(model.runner)
        self.engine = replace(model, runner=self.runner).engine()
        self.outputs: dict[str, Output] = defaultdict(Output)
        self.reports: list[SwitchReport] = []

    def send(self, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
        self.engine.add_request(name, prompt, params)

    def send_all(self) -> None:
        """Requests of every length; every other one is sampled, with its own seed."""
        for index, length in enumerate(LENGTHS):
            params = SamplingParams(
                max_tokens=40 + 3 * index,
                temperature=0.9 if index % 2 else 0.0,
                top_p=0.95 if index % 2 else 1.0,
                seed=index,
                ignore_eos=True,
                logprobs=0,
            )
            self.send(f"r{index}", random_token_ids(length, 256, seed=length), params)
        scored = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        self.send("scored", SCORED, scored)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for delta in self.engine.step():
                assert delta.error is None
                output = self.outputs[delta.request_id]
                output.token_ids += delta.token_ids
                output.logprobs += [token.logprob for token in delta.logprobs]
                if delta.prompt_logprobs is not None:
                    output.prompt_logprobs = delta.prompt_logprobs.logprobs.tolist()

    def switch(self, layout: str, strategy: SwitchStrategy) -> None:
        ticket = self.engine.begin_switch(layout, strategy)
        while ticket.report is None:
            assert ticket.error is None
            self.step()
        self.reports.append(ticket.report)

    def finish(self) -> dict[str, Output]:
        while self.engine.has_work:
            self.step()
        stats = self.engine.stats()
        assert stats.compiles_after_warmup == 0
        assert stats.free_blocks == (stats.num_blocks,) * 4
        return self.outputs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, {**CASES["llama_mha"], "max_position_embeddings": 512})
    # Small blocks: a context is many slabs, so that long ones are copied ahead.
    return load_model(small_config(folder, block_size=4, num_blocks=400))


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> dict[str, Output]:
    """Everybody in a layout that never switches."""
    server = Server(model)
    server.send_all()
    return server.finish()


@pytest.fixture
def server(model: LoadedModel) -> Server:
    return Server(model)


@pytest.fixture
def uploads(server: Server) -> list[tuple[Upload, int]]:
    """Each upload of the test, with the block size of the program that it went to."""
    shapes, seen = server.runner.shapes, []

    def watch(plan: StepPlan, launch: Launch) -> None:
        upload = Upload.of(plan, launch, shapes)
        size = shapes.kv_layout(launch.key.group.tp).block_tokens
        assert upload.wrong_slots(size) == []
        seen.append((upload, size))

    server.runner.on_pack = watch
    return seen


def assert_same(outputs: dict[str, Output], expected: dict[str, Output]) -> None:
    assert set(outputs) == set(expected)
    for name, reference in expected.items():
        assert outputs[name].token_ids == reference.token_ids, name
        for got, want in (
            (outputs[name].logprobs, reference.logprobs),
            (outputs[name].prompt_logprobs, reference.prompt_logprobs),
        ):
            np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0, err_msg=name)


def test_the_requests_alone_give_the_same_as_together(model: LoadedModel, expected: dict[str, Output]) -> None:
    """What the switched runs below are compared with is itself right."""
    alone = score_on_group(model.runner, all_groups(4, 1)[0], SCORED)
    np.testing.assert_allclose(expected["scored"].prompt_logprobs, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layouts", [UP_AND_DOWN, MIXED], ids=["up and down", "mixed"])
@pytest.mark.parametrize("strategy", SwitchStrategy)
def test_requests_in_flight_give_the_same_whatever_the_layout_does(
    server: Server,
    expected: dict[str, Output],
    uploads: list[tuple[Upload, int]],
    layouts: Sequence[str],
    strategy: SwitchStrategy,
) -> None:
    weights = server.runner.weights
    addresses = {group: weights.addresses(group) for group in all_groups(4, 1)}
    server.send_all()
    server.step(3)
    for layout in layouts:
        server.switch(layout, strategy)
        server.step(3)
    assert_same(server.finish(), expected)
    assert {group: weights.addresses(group) for group in addresses} == addresses
    moved = sum(report.requests_moved for report in server.reports)
    paused = sum(report.requests_paused for report in server.reports)
    assert (moved > 0, paused > 0) == (strategy is SwitchStrategy.MIGRATE, strategy is SwitchStrategy.HARD_PREEMPT)
    if strategy is SwitchStrategy.MIGRATE:
        assert sum(report.kv_bytes_precopied for report in server.reports) > 0
        assert {size for _, size in uploads} == {4, 8, 16}
    if strategy is not SwitchStrategy.SOFT_PREEMPT:
        assert sum(report.tokens_recomputed for report in server.reports) == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_switches_with_all_strategies_mixed_change_no_token(
    server: Server, expected: dict[str, Output], uploads: list[tuple[Upload, int]], seed: int
) -> None:
    draw = random.Random(seed)
    server.send_all()
    while server.engine.has_work:
        server.step(draw.randint(1, 8))
        if server.engine.scheduler.requests and not server.engine.switching:
            layout = draw.choice(("1+1+1+1", "2+1+1", "1+1+2", "2+2", "4"))
            strategies = [*SwitchStrategy, SwitchStrategy.MIGRATE, SwitchStrategy.HARD_PREEMPT]
            server.engine.begin_switch(layout, draw.choice(strategies))
    assert_same(server.finish(), expected)
    assert uploads
    # How many more there are is a matter of time: one that drains may last until the last request has ended.
    assert server.engine.control.log.count.total() >= 1


def test_likelihoods_on_every_group_are_those_of_the_first_layout_after_switches(
    model: LoadedModel, server: Server, expected: dict[str, Output]
) -> None:
    """One rank that kept an old block size would give the same greedy text and another likelihood."""
    server.send_all()
    for layout in ("2+2", "4", "2+2"):
        server.step(4)
        server.switch(layout, SwitchStrategy.MIGRATE)
    running = server.engine.scheduler.num_running
    assert running
    assert_same(server.finish(), expected)
    for group in all_groups(4, 1):
        scores = score_on_group(model.runner, group, SCORED)
        np.testing.assert_allclose(
            scores, expected["scored"].prompt_logprobs, atol=TOLERANCE, rtol=0, err_msg=str(group)
        )
    for layout in ("2+2", "4", "2+1+1", "1+1+1+1"):
        server.switch(layout, SwitchStrategy.MIGRATE)
        names = [f"{layout} {index}" for index in range(4)]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        for name in names:
            server.send(name, SCORED, params)
        server.finish()
        for name in names:
            scores = server.outputs[name].prompt_logprobs
            np.testing.assert_allclose(scores, expected["scored"].prompt_logprobs, atol=TOLERANCE, rtol=0, err_msg=name)


def test_generated_tokens_have_the_likelihood_that_the_model_gives_them_when_it_reads_them(
    model: LoadedModel, server: Server
) -> None:
    """Their KV was written by steps of four layouts; read again from the beginning, one layout must agree."""
    server.send_all()
    for layout in ("2+2", "4", "2+2", "1+1+1+1"):
        server.step(7)
        server.switch(layout, SwitchStrategy.MIGRATE)
    outputs = server.finish()
    runner: ModelRunner = model.runner
    for index, length in list(enumerate(LENGTHS))[::3]:
        output = outputs[f"r{index}"]
        tokens = [*random_token_ids(length, 256, seed=length), *output.token_ids]
        scores = score_on_group(runner, all_groups(4, 1)[0], tokens)[length - 1 :]
        np.testing.assert_allclose(output.logprobs, scores, atol=TOLERANCE, rtol=0)
