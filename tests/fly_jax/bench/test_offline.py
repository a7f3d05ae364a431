"""``throughput`` and ``latency``: what they ask of an engine, and what they make of its answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fly_jax.bench import latency, offline, throughput
from fly_jax.bench.__main__ import main
from fly_jax.bench.plan_limits import FIRST_RANDOM_ID
from fly_jax.errors import ConfigError, FlyJaxError
from fly_jax.outputs import FinishReason, RequestOutput, SwitchReport, SwitchStrategy
from fly_jax.sampling_params import SamplingParams

VOCABULARY = 50


class FakeLLM:
    """Answers at once with as many tokens as asked for, and remembers what it was asked.

    Args:
        interrupted_at: the number of the call, from 0, that Ctrl-C ends.
    """

    def __init__(
        self, layout: str, finish: FinishReason = FinishReason.LENGTH, interrupted_at: int | None = None
    ) -> None:
        self.layout, self.finish, self.interrupted_at = layout, finish, interrupted_at
        self.model_config: Any = SimpleNamespace(vocab_size=VOCABULARY)
        self.calls: list[tuple[str, list[tuple[int, ...]], SamplingParams]] = []

    def generate(self, prompts: list[tuple[int, ...]], params: SamplingParams) -> list[RequestOutput]:
        if len(self.calls) == self.interrupted_at:
            raise KeyboardInterrupt
        self.calls.append((self.layout, prompts, params))
        assert params.max_tokens is not None
        answer, error = (7,) * params.max_tokens, "no room" if self.finish is FinishReason.ERROR else None
        return [
            RequestOutput(str(n), None, prompt, "", answer, (), None, self.finish, error=error)
            for n, prompt in enumerate(prompts)
        ]

    def switch(self, layout: str) -> SwitchReport:
        source, self.layout = self.layout, layout
        return SwitchReport(1, source, layout, SwitchStrategy.MIGRATE)


def options_of(command: Any, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(given)
    offline.check(options, ())
    return options


def measured(command: Any, llm: FakeLLM, options: argparse.Namespace) -> list[Any]:
    rows: list[Any] = []
    command.measure(llm, options, rows)
    return rows


def run_on(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    """The command line, with this engine in place of one of a model."""

    @contextmanager
    def loaded(*_: object) -> Iterator[FakeLLM]:
        yield llm

    monkeypatch.setattr(offline, "loaded_engine", loaded)
    return main(given)


def test_throughput_measures_every_layout_with_one_engine() -> None:
    given = ["--layout", "dp4", "2+2", "tp4", "--num-prompts", "6", "--input-len", "5", "--output-len", "3"]
    llm = FakeLLM("1+1+1+1")
    rows = measured(throughput, llm, options_of(throughput, *given))
    assert [row.layout for row in rows] == ["1+1+1+1", "2+2", "4"]
    assert [row.switch_ms is None for row in rows] == [True, False, False]
    for row in rows:
        assert (row.num_requests, row.total_num_tokens, row.total_output_tokens) == (6, 6 * (5 + 3), 6 * 3)
        assert row.requests_per_second == pytest.approx(6 / row.elapsed_time)
        assert row.tokens_per_second == pytest.approx(48 / row.elapsed_time)
    counted = [(layout, len(prompts)) for layout, prompts, _ in llm.calls]
    warmup = 4 * throughput.WARMUP_PROMPTS_A_DEVICE
    assert counted == [(row.layout, count) for row in rows for count in (warmup, 6)]


def test_rates_are_of_all_tokens_and_of_answers() -> None:
    row = throughput.throughput(offline.InLayout("4", 1.5), 2.0, 10, of_prompts=300, of_answers=100)
    assert asdict(row) == {
        "layout": "4", "switch_ms": 1.5, "elapsed_time": 2.0, "num_requests": 10, "total_num_tokens": 400,
        "total_output_tokens": 100, "requests_per_second": 5.0, "tokens_per_second": 200.0,
        "output_tokens_per_second": 50.0,
    }  # fmt: skip


def test_latency_leaves_the_warmup_out() -> None:
    given = ["--layout", "4", "1+1+1+1", "--batch-size", "3", "--num-iters-warmup", "2", "--num-iters", "4"]
    llm = FakeLLM("4")
    rows = measured(latency, llm, options_of(latency, *given))
    assert [row.layout for row in rows] == ["4", "1+1+1+1"]
    assert [len(row.latencies) for row in rows] == [4, 4]
    assert [(layout, len(prompts)) for layout, prompts, _ in llm.calls] == [("4", 3)] * 6 + [("1+1+1+1", 3)] * 6


def test_latency_has_the_mean_and_interpolated_percentiles() -> None:
    row = latency.latency(offline.InLayout("4", None), [float(n) for n in range(101)])
    assert list(asdict(row)) == ["layout", "switch_ms", "avg_latency", "latencies", "percentiles"]
    assert row.avg_latency == 50.0
    assert row.percentiles == pytest.approx({"10": 10, "25": 25, "50": 50, "75": 75, "90": 90, "99": 99})
    assert latency.latency(offline.InLayout("4", None), [1.0, 2.0]).percentiles["75"] == pytest.approx(1.75)


def test_requests_are_random_ids_of_the_length_asked_for_and_go_on_past_the_end() -> None:
    llm = FakeLLM("4")
    measured(throughput, llm, options_of(throughput, "--layout", "4", "--num-prompts", "200", "--output-len", "9"))
    _, prompts, params = llm.calls[-1]
    assert {len(prompt) for prompt in prompts} == {128}
    ids = {token for prompt in prompts for token in prompt}
    assert ids == set(range(FIRST_RANDOM_ID, VOCABULARY))
    assert (params.max_tokens, params.ignore_eos) == (9, True)


def test_a_seed_gives_the_same_prompts_and_no_prompt_comes_twice() -> None:
    def taken(seed: int) -> list[tuple[int, ...]]:
        source = offline.PromptSource(seed, VOCABULARY, 16)
        return [*source.take(20), *source.take(20)]

    assert taken(3) == taken(3)
    assert taken(3) != taken(4)
    assert len(set(taken(3))) == 40


def test_a_request_that_fails_ends_the_run_with_its_reason() -> None:
    options = options_of(throughput, "--layout", "4", "--num-prompts", "5")
    with pytest.raises(FlyJaxError, match=r"8 of 8 requests did not complete, the first: no room"):
        measured(throughput, FakeLLM("4", FinishReason.ERROR), options)
    with pytest.raises(FlyJaxError, match=r"the first: 64 of 64 tokens, stop"):
        measured(throughput, FakeLLM("4", FinishReason.STOP), options)


def test_throughput_says_which_layout_runs_and_what_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(FakeLLM("1+1"), monkeypatch, "throughput", "--devices", "2", "--layout", "dp2", "2") == 0
    assert capsys.readouterr().err.splitlines() == [
        "layout 1 of 2, 1+1: 128 requests, and 4 before that are not timed",
        "layout 2 of 2, 2: 128 requests, and 4 before that are not timed",
    ]


def test_ctrl_c_prints_and_saves_the_layouts_that_throughput_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "part.json"
    given = ["throughput", "--layout", "1+1+1+1", "2+2", "4", "--output-json", str(path)]
    # Two calls a layout: the sixth is the third layout's that counts.
    assert run_on(FakeLLM("1+1+1+1", interrupted_at=5), monkeypatch, *given) == 130
    found = json.loads(path.read_text())
    assert found["interrupted"]
    assert [row["layout"] for row in found["rows"]] == ["1+1+1+1", "2+2"]
    printed = capsys.readouterr()
    assert "2+2" in printed.out
    assert "interrupted: there are figures of 2 of 3 layouts" in printed.err


def test_ctrl_c_leaves_latency_the_batches_that_have_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "part.json"
    given = ["latency", "--num-iters-warmup", "2", "--num-iters", "5", "--output-json", str(path)]
    assert run_on(FakeLLM("1+1+1+1", interrupted_at=5), monkeypatch, *given) == 130
    found = json.loads(path.read_text())
    assert (found["interrupted"], len(found["latencies"])) == (True, 3)
    assert "1+1+1+1" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_ctrl_c_before_anything_is_measured_writes_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "part.json"
    assert run_on(FakeLLM("4", interrupted_at=0), monkeypatch, command, "--output-json", str(path)) == 130
    assert not path.exists()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted: there are figures of 0 of 1 layouts" in printed.err


def test_a_whole_run_is_not_called_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "whole.json"
    assert run_on(FakeLLM("4"), monkeypatch, "throughput", "--output-json", str(path)) == 0
    assert json.loads(path.read_text())["interrupted"] is False


def test_one_layout_has_vllms_keys_at_the_top_and_several_have_rows(tmp_path: Path) -> None:
    options = options_of(throughput, "--model", str(tmp_path / "folder" / "my-model"))
    rows = [{"layout": layout, "elapsed_time": 1.0} for layout in ("4", "2+2")]
    one = offline.result(options, {"seed": 0}, rows[:1])
    assert one == {"model": "my-model", "seed": 0, "layout": "4", "elapsed_time": 1.0, "rows": rows[:1]}
    assert offline.result(options, {"seed": 0}, rows) == {"model": "my-model", "seed": 0, "rows": rows}


def test_a_request_must_fit_the_context_and_there_must_be_ids() -> None:
    options = options_of(latency, "--input-len", "1000", "--output-len", "25")
    with pytest.raises(ConfigError, match=r"--input-len 1000 \+ --output-len 25 exceed the model's context of 1024"):
        offline.check_lengths(options, 1024, VOCABULARY)
    offline.check_lengths(options, 1025, VOCABULARY)
    with pytest.raises(ConfigError, match="vocabulary has 10"):
        offline.check_lengths(options, 1025, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["throughput", "--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["throughput", "--max-num-seqs", "-1"], "--max-num-seqs must be at least 1, got -1"),
        (["throughput", "--input-len", "0"], "--input-len must be at least 1, got 0"),
        (["throughput", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["throughput", "--layout", "2+2", "3+1"], "not an aligned power of two"),
        (["throughput", "--layout", "dp8", "--devices", "4"], "uses 8 devices but the engine has 4"),
        (["throughput", "--layout", "tp4", "4"], "names a layout twice"),
        (["throughput", "--output-json", "/"], "is a folder"),
        (["latency", "--output-json", "/dev/null/x.json"], "cannot be a folder"),
        (["latency", "--output-len", "0"], "--output-len must be at least 1, got 0"),
        (["latency", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["latency", "--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["latency", "--num-iters-warmup", "-1"], "--num-iters-warmup must be at least 0, got -1"),
        (["latency", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["latency", "--input-len", "4000"], "exceed the model's context of 1024 tokens"),
        (["latency", "--model", "/nowhere"], "model folder /nowhere does not exist"),
    ],
)
def test_wrong_options_are_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_bundled_model_is_measured_in_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "latency.json"
    given = ["--devices", "2", "--layout", "1+1", "2", "--batch-size", "2", "--input-len", "8", "--output-len", "4"]
    assert main(["latency", *given, "--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"date", "jax", "device_kind", "host"} <= result.keys()
    assert (result["model"], result["batch_size"], result["num_iters"]) == ("demo", 2, 3)
    assert [row["layout"] for row in result["rows"]] == ["1+1", "2"]
    for row in result["rows"]:
        assert len(row["latencies"]) == 3
        assert row["avg_latency"] == pytest.approx(np.mean(row["latencies"]))
        assert min(row["latencies"]) > 0
    printed = capsys.readouterr().out
    assert "1+1" in printed
    assert "p99" in printed
