"""Launches are plain data: they can be counted, logged and sent, and whoever executes them gets the same results."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest

from fly_jax.device.packing import pack_step
from fly_jax.engine.engine import Engine
from fly_jax.engine.loader import LoadedModel, load_model
from fly_jax.kv.slabs import PackedRelayout
from fly_jax.logprobs import TokenLogprob
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.launch import Launch, StepKind, Work
from fly_jax.scheduling.results import read_results
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.simulated_runner import simulated_engine
from tests.fly_jax.virtual_time import Arrival, Simulation
from tests.fly_jax.watched_runner import WatchedRunner
from tests.support import migrated_through, small_config
from tests.tiny_models import CASES, random_token_ids, write_model

# Modules of what a launch may consist of.
PLAIN = {"fly_jax.scheduling.launch", "fly_jax.kv.slabs", "fly_jax.layout"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, {**CASES["llama_mha"], "max_position_embeddings": 512})
    # Without overlap the same requests make the same steps whatever the time; blocks are small, so that KV moves.
    return load_model(small_config(folder, block_size=4, num_blocks=400, layout="2+2", overlap=False))


def serve(engine: Engine) -> dict[str, list[TokenLogprob]]:
    """Prompts of one and of several chunks, greedy and sampled, scored and not, over two switches that move KV."""
    for index, length in enumerate((3, 40, 90, 200, 300, 17)):
        params = SamplingParams(
            max_tokens=40,
            temperature=0.8 if index % 2 else 0.0,
            seed=index,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs={1: 3, 4: 0}.get(index),
        )
        engine.add_request(f"r{index}", random_token_ids(length, 256, seed=length), params)
    return migrated_through(engine, ["4", "1+1+1+1"], every=8)


def watched(model: LoadedModel, send: Callable[[Any], Any] = lambda launch: launch) -> tuple[Engine, WatchedRunner]:
    runner = WatchedRunner(model.runner)
    runner.send = send
    return replace(model, runner=runner).engine(), runner


def through_bytes(launch: Any) -> Any:
    """A copy that another process could have made; it consists of nothing but numbers, texts and arrays."""
    data = pickle.dumps(launch)
    texts = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert {each for each in texts if each.startswith(("jax", "fly_jax"))} <= PLAIN
    return pickle.loads(data)


def test_what_is_executed_may_be_a_copy_that_was_sent_as_bytes(model: LoadedModel) -> None:
    engine, runner = watched(model)
    expected = serve(engine)
    kinds = {key.kind for each in runner.log if isinstance(each, tuple) for key in each[0].arrays}
    assert kinds == {StepKind.DECODE, StepKind.MIXED, StepKind.HEAD, StepKind.SCORE}
    assert any(isinstance(each, PackedRelayout) for each in runner.log)
    assert serve(watched(model, through_bytes)[0]) == expected


def test_a_log_of_launches_gives_the_same_log_probabilities_on_another_runner(model: LoadedModel) -> None:
    engine, runner = watched(model)
    serve(engine)
    assert engine.control.log.kv_bytes_moved > 0
    other, plans, rows = WatchedRunner(model.runner, fresh=True), iter(runner.plans), 0
    for each in runner.log:
        if isinstance(each, PackedRelayout):
            other.relayout(each)
            continue
        (launch, step), plan = each, next(plans)
        for got, want in zip(
            read_results(plan, other.execute(launch).results()), read_results(plan, step.results()), strict=True
        ):
            rows += 1
            assert got.token == want.token
            assert (got.scores is None) == (want.scores is None)
            if got.scores is not None and want.scores is not None:
                assert list(got.scores) == list(want.scores)
    assert rows > 100


def works(*requests: tuple[int, int], **options: Any) -> list[Work]:
    """Of every launch, for requests of so many prompt and output tokens; the second begins when the first decodes."""
    engine, runner = simulated_engine(layout="4", max_num_batched_tokens=48, max_num_seqs=2, **options)
    found: list[Work] = []
    runner.on_pack = lambda _, launch: found.append(launch.work)
    for index, (prompt, output) in enumerate(requests):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add_request(str(index), [1 + index] * prompt, params)
        while index == 0 and not (found and found[-1].rows):
            engine.step()
    while engine.has_work:
        engine.step()
    return found


def test_a_launch_counts_the_tokens_of_each_chunk_and_then_those_of_each_decode() -> None:
    """As (rows, prompt tokens, context tokens, samples)."""
    chunks = [(0, 48, 48, 0), (0, 48, 96, 0), (0, 4, 100, 1)]
    decodes = [(1, 0, 101, 1), (1, 0, 102, 1), (1, 0, 103, 1)]
    assert [astuple(work) for work in works((100, 4))] == [*chunks, *decodes]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_mixed_launch_counts_its_decodes_and_its_chunks(overlap: bool) -> None:
    found = [astuple(work) for work in works((20, 6), (40, 3), overlap=overlap)]
    alone, mixed = [(0, 20, 20, 1), (1, 0, 21, 1)], [(1, 32, 22 + 32, 1), (1, 8, 23 + 40, 2)]
    assert found == [*alone, *mixed, (2, 0, 24 + 41, 2), (2, 0, 25 + 42, 2)]


@pytest.mark.parametrize("instant", [True, False])
def test_all_launches_together_count_what_all_requests_asked_for(instant: bool) -> None:
    engine, runner = simulated_engine(layout="2+1+1", instant=instant, num_blocks=256)
    found: list[Work] = []
    runner.on_pack = lambda _, launch: found.append(launch.work)
    requests = [(3 + 11 * index % 90, 1 + 7 * index % 13) for index in range(20)]
    for index, (prompt, output) in enumerate(requests):
        engine.add_request(str(index), [1 + index] * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_preemptions == 0
    assert sum(work.prompt_tokens for work in found) == sum(prompt for prompt, _ in requests)
    assert sum(work.samples for work in found) == sum(output for _, output in requests)
    assert sum(work.rows for work in found) == sum(output - 1 for _, output in requests)


def test_a_runner_that_only_keeps_time_gives_launches_the_key_and_the_work_of_a_real_one() -> None:
    simulation = Simulation([Arrival(0.1 * index, 50 + 97 * index % 400, 30) for index in range(12)])
    shapes, packed = simulation.runner.shapes, 0

    def compare(plan: StepPlan, launch: Launch) -> None:
        nonlocal packed
        real = pack_step(plan, shapes)
        assert (launch.key, launch.work) == (real.key, real.work)
        packed += 1

    simulation.runner.on_pack = compare
    simulation.run()
    assert packed > 100
