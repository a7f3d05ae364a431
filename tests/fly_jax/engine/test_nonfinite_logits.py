"""Logits that are no distribution end their own request with an error and touch nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fly_jax import LLM, RequestOutput, SamplingParams
from fly_jax.errors import RequestFailedError
from fly_jax.outputs import FinishReason, SwitchStrategy
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.results import StepResults
from tests.fly_jax.simulated_runner import SimulatedRunner
from tests.fly_jax.traffic import Traffic, send
from tests.support import small_llm
from tests.tiny_models import CASES, random_token_ids, write_model

pytestmark = pytest.mark.slow  # its engines

# An id that no prompt below has and the clean model never generates for them.
BROKEN_TOKEN = 256
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
MESSAGE = "the model gave NaN or infinite logits after {} prompt and {} output tokens"


def prompts() -> list[list[int]]:
    return [random_token_ids(length, 256, seed=length) for length in (5, 40, 70, 17, 9, 33)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken")
    write_model(path, CASES["llama_heads_8_kv_2"])
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    with small_llm(folder, layouts=("4",), layout="4") as clean:
        outputs = clean.generate(prompts(), GREEDY)
    assert all(BROKEN_TOKEN not in output.token_ids for output in outputs)
    return outputs


def break_embeddings(folder: Path, tokens: set[int]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][sorted(tokens)] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def late_token(expected: list[RequestOutput]) -> int:
    """A token that the clean model generates after a few others for the first prompt and nowhere else."""
    others = {token for output in expected[1:] for token in output.token_ids} | {t for p in prompts() for t in p}
    return next(t for t in expected[0].token_ids[2:-1] if t not in others and expected[0].token_ids.count(t) == 1)


@pytest.fixture(scope="module")
def llm(folder: Path, late_token: int) -> Iterator[LLM]:
    break_embeddings(folder, {BROKEN_TOKEN, late_token})
    with small_llm(folder, layouts=("1+1+1+1", "4"), layout="4") as engine:
        yield engine


@pytest.mark.parametrize("layout", ["4", "1+1+1+1"])
def test_only_requests_that_meet_a_broken_embedding_fail(
    llm: LLM, expected: list[RequestOutput], late_token: int, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm.switch(layout)
    before = llm.stats().corrupted_requests
    broken = [*prompts()[2][:30], BROKEN_TOKEN, *prompts()[2][30:]]
    with caplog.at_level(logging.ERROR):
        first, *healthy, at_once, scored = llm.generate(
            [*prompts(), broken, broken], [*[GREEDY] * 6, GREEDY, replace(GREEDY, prompt_logprobs=0)]
        )
    place = expected[0].token_ids.index(late_token) + 1
    assert first.token_ids == expected[0].token_ids[:place]  # what came before the failure
    assert first.finish_reason is at_once.finish_reason is scored.finish_reason is FinishReason.ERROR
    assert first.error is not None
    assert first.error.startswith(MESSAGE.format(5, place))
    assert at_once.error == scored.error
    assert at_once.error.startswith(MESSAGE.format(71, 0))
    assert at_once.token_ids == ()
    for output, reference in zip(healthy, expected[1:], strict=True):
        assert (output.token_ids, output.finish_reason) == (reference.token_ids, FinishReason.LENGTH)
        got, want = ([token.logprob for token in each.logprobs] for each in (output, reference))
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)
    stats = llm.stats()
    assert stats.corrupted_requests - before == 3
    assert stats.free_blocks == (stats.num_blocks,) * 4
    assert stats.compiles_after_warmup == 0
    assert len([record for record in caplog.records if "NaN or infinite logits" in record.message]) == 3


def test_scoring_a_prompt_raises_what_happened(llm: LLM) -> None:
    with pytest.raises(RequestFailedError, match="NaN or infinite logits"):
        llm.score([5, 6, BROKEN_TOKEN, 7])


class FailingRunner(SimulatedRunner):
    """The results of requests named in ``fails`` are NaN from this many tokens of context on."""

    fails: dict[str, int]

    def compute(self, launch: Launch) -> StepResults:
        results = super().compute(launch)
        for index, row in enumerate(self.plans[-1].sampled):
            if row.start + row.count >= self.fails.get(row.request.request_id, 10**9):
                assert results.tokens is not None
                results.tokens.view(np.float32)[index, 1] = np.nan
        return results


@pytest.mark.parametrize("strategy", list(SwitchStrategy))
@pytest.mark.parametrize("overlap", [True, False])
def test_a_failure_in_the_middle_of_switches_and_preemptions_frees_everything(
    strategy: SwitchStrategy, overlap: bool
) -> None:
    """Two steps are in flight and the pool is short, so failed requests are found running, paused and waiting again."""
    traffic = Traffic(
        num_blocks=16, max_num_seqs=4, instant=False, overlap=overlap, runner_type=FailingRunner, strategy=strategy
    )
    assert isinstance(traffic.runner, FailingRunner)
    traffic.runner.fails = {"r1": 12, "r2": 19, "r5": 9}
    requests = [send(traffic, list(range(1, 8)), max_tokens=20) for _ in range(8)]
    for target in ("2+2", "4", "1+1+1+1"):
        traffic.step(3)
        traffic.switch(target, strategy)
        for _ in range(60):
            traffic.step()
            if not traffic.engine.switching:
                break
    while traffic.engine.has_work:
        traffic.step()
    failed = {request.request_id: len(request.output_ids) for request in requests if request.finish_reason == "error"}
    assert failed == {"r1": 5, "r2": 12, "r5": 2}
    for name in failed:
        assert traffic.deltas[name][-1].error is not None
    assert traffic.kv.usage == 0
    assert all(len(request.output_ids) == 20 for request in requests if request.request_id not in failed)
