"""The command: options, a server that answers at once, and one of our own."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints.demo import MODEL
from fly_jax.bench.__main__ import main, parse
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.serve_plan import plan
from fly_jax.bench.serve_run import check
from fly_jax.bench.served_model import ServedModel
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.null_server import TOKENS, null_server
from tests.fly_jax.bench.workload_builders import write_azure, write_sharegpt


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with null_server() as url:
        yield url


def planned(given: list[str], max_model_len: int | None) -> list[PlannedRequest]:
    """What these options plan for a model of that length."""
    options = parse(["serve", *given])
    return list(plan(options, check(options), ServedModel("m", max_model_len)).requests)


def test_a_run_prints_its_table_and_saves_its_figures(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["serve", "--base-url", url, "--num-prompts", "12", "--request-rate", "500", "--random-input-len", "5"]
    given += ["--random-output-len", "8", "--seed", "4", "--goodput", "ttft:60000", "--metric-percentiles", "50,99.5"]
    given += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "run.json"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert "Serving Benchmark Result" in printed.out
    assert "P99.5 TTFT (ms):" in printed.out
    assert "the server has no GET /layout" in printed.err
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["completed"], found["failed"], found["num_prompts"]) == (12, 0, 12)
    assert (found["model_id"], found["backend"], found["workload"], found["seed"]) == ("null", "openai", "random", 4)
    assert (found["total_output_tokens"], found["output_lens"]) == (12 * TOKENS, [TOKENS] * 12)
    assert found["input_lens"] == [4] * 12  # from the server's usage
    assert found["request_goodput"] == found["request_throughput"]
    assert found["request_rate"] == 500.0
    assert found["generated_texts"] == ["x" * TOKENS] * 12
    assert (found["layout_timeline"], found["layout_switches"], found["switch_stall_ms"]) == ([], 0, [])
    assert found.keys() >= {"date", "fly_jax", "jax", "python", "host", "p99.5_itl_ms"}
    assert "device_kind" not in found  # this machine's need not be the server's


def test_warm_ups_are_sent_first_and_not_counted_and_words_of_the_user_s_are_kept(tmp_path: Path) -> None:
    requests: list[bytes] = []
    with null_server(requests.append) as url:
        given = ["serve", "--port", url.rpartition(":")[2], "--num-prompts", "4", "--random-input-len", "5"]
        given += ["--num-warmups", "3", "--metadata", "gpu=none", "completed=0", "--save-result"]
        assert main([*given, "--result-dir", str(tmp_path)]) == 0
    assert requests.count(b"/v1/completions") == 7
    [path] = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert (found["completed"], found["gpu"], len(found["ttfts"])) == (4, "none", 4)


def test_a_warm_up_that_fails_ends_the_run(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["serve", "--base-url", url, "--endpoint", "/other/completions", "--num-prompts", "3"]
    assert main([*given, "--num-warmups", "2", "--random-input-len", "5"]) == 2
    assert "2 of 2 warm-up requests failed: HTTP 404" in capsys.readouterr().err


def test_the_default_file_name_is_like_vllm_s(url: str, tmp_path: Path) -> None:
    given = ["serve", "--base-url", url, "--num-prompts", "2", "--random-input-len", "5", "--max-concurrency", "1"]
    assert main([*given, "--save-result", "--result-dir", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    assert path.name.startswith("openai-infqps-concurrency1-null-20")


def test_a_run_in_which_nothing_is_answered_ends_with_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["serve", "--base-url", url, "--endpoint", "/other/completions", "--num-prompts", "3"]
    assert main([*given, "--random-input-len", "5"]) == 1
    printed = capsys.readouterr()
    assert "3 requests failed: HTTP 404" in printed.err
    assert re.search(r"Mean TTFT \(ms\): +-$", printed.out, re.MULTILINE)


@pytest.mark.usefixtures("python_s_sigint")
def test_ctrl_c_prints_and_saves_what_has_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third request presses it, which leaves when two have ended; the rest would take an hour."""
    requests: list[bytes] = []

    def on_request(path: bytes) -> None:
        requests.append(path)
        if requests.count(b"/v1/completions") == 3:
            os.kill(os.getpid(), signal.SIGINT)

    given = ["serve", "--num-prompts", "5000", "--max-concurrency", "1", "--random-input-len", "5", "--save-result"]
    given += ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1000", "--ramp-up-end-rps", "0.001"]
    given += ["--result-dir", str(tmp_path), "--result-filename", "part"]
    with null_server(on_request) as url:
        assert main([*given, "--base-url", url]) == 130
    printed = capsys.readouterr()
    assert "Serving Benchmark Result" in printed.out
    assert "of 5000 requests had been sent" in printed.err
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["interrupted"]
    assert 2 <= found["completed"] <= found["num_prompts"] < 5000


def test_what_is_left_out_is_made_to_fit_the_model() -> None:
    for max_model_len, inputs, outputs in ((None, 1024, 128), (1024, 896, 128), (64, 56, 8), (2, 1, 1)):
        [request] = planned(["--num-prompts", "1"], max_model_len)
        assert (request.prompt_tokens, request.max_tokens) == (inputs, outputs)
    [request] = planned(["--num-prompts", "1", "--random-output-len", "500"], 1024)
    assert (request.prompt_tokens, request.max_tokens) == (524, 500)


def test_with_a_range_even_the_longest_fits() -> None:
    for ratio in ("0.1", "0.3", "0.5", "0.9"):
        requests = planned(["--num-prompts", "500", "--random-range-ratio", ratio], 1024)
        assert 900 < max(request.prompt_tokens + request.max_tokens for request in requests) <= 1024
        assert len({request.prompt_tokens for request in requests}) > 50


def test_what_is_given_and_does_not_fit_is_refused_with_both_values() -> None:
    with pytest.raises(ConfigError, match="up to 1128 tokens and the model holds 1024"):
        planned(["--random-input-len", "1000", "--random-output-len", "128"], 1024)


def test_a_workload_has_its_own_times_and_a_dataset_those_of_the_rate(tmp_path: Path) -> None:
    workload = planned(["--workload", "random"], 1024)
    assert (len(workload), workload[-1].at > 30) == (200, True)
    assert len(planned(["--workload", "random", "--num-prompts", "300"], 1024)) == 300
    assert {request.at for request in planned(["--workload", "random", "--request-rate", "inf"], 1024)} == {0.0}
    azure = write_azure(tmp_path, [("18:00:00", 40, 5), ("18:00:30", 50, 6)])
    given = ["--dataset-path", str(azure)]
    assert [request.at for request in planned(["--workload", "azure", *given], 1024)] == [0.0, 30.0]
    assert [request.at for request in planned(["--dataset-name", "azure", *given], 1024)] == [0.0, 0.0]
    assert planned(["--dataset-name", "azure", "--request-rate", "4", *given], 1024)[-1].at == pytest.approx(0.5)


def test_what_does_not_fit_the_model_is_said_and_saved(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    azure = write_azure(tmp_path, [("18:00:00", 4000, 5), ("18:00:00", 50, 6), ("18:00:00", 9, 0)])
    given = ["serve", "--base-url", url, "--dataset-name", "azure", "--dataset-path", str(azure), "--save-result"]
    assert main([*given, "--max-model-len", "512", "--result-dir", str(tmp_path), "--result-filename", "run"]) == 0
    assert "1 clipped to 512 tokens, 1 entries without a prompt or an output skipped" in capsys.readouterr().err
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["completed"], found["clipped_requests"], found["skipped_entries"]) == (2, 1, 1)


def test_fractions_of_an_unknown_context_are_refused_and_a_given_one_is_used() -> None:
    with pytest.raises(ConfigError, match="the server does not say it: --max-model-len"):
        planned(["--workload", "long_context"], None)
    requests = planned(["--workload", "long_context", "--max-model-len", "2000"], None)
    assert 1500 <= max(request.prompt_tokens for request in requests) <= 1800


@pytest.mark.parametrize(
    ("given", "past_end"),
    [
        ([], True),
        (["--no-ignore-eos"], False),
        (["--workload", "burst"], True),
        (["--dataset-name", "sharegpt"], False),
        (["--dataset-name", "sharegpt", "--ignore-eos"], True),
    ],
)
def test_made_up_text_is_generated_to_its_length_and_real_text_to_its_end(
    given: list[str], past_end: bool, tmp_path: Path
) -> None:
    if "sharegpt" in given:
        given = [*given, "--dataset-path", str(write_sharegpt(tmp_path, [[("human", "a"), ("gpt", "b")]]))]
    assert check(parse(["serve", *given])).ignore_eos is past_end


def test_every_workload_can_be_sent_as_text() -> None:
    options = parse(["serve", "--workload", "random", "--backend", "openai-chat", "--num-prompts", "3"])
    requests = plan(options, check(options), ServedModel("m", 1024), as_text=True).requests
    for request in requests:
        assert isinstance(request.prompt, str)
        assert len(request.prompt.split(" ")) == request.prompt_tokens


def test_a_ramp_is_recorded_with_the_keys_of_vllm(url: str, tmp_path: Path) -> None:
    given = [
        "serve",
        "--base-url",
        url,
        "--num-prompts",
        "4",
        "--random-input-len",
        "5",
        "--ramp-up-strategy",
        "linear",
    ]
    given += ["--ramp-up-start-rps", "200", "--ramp-up-end-rps", "400", "--backend", "vllm", "--label", "mine"]
    assert main([*given, "--save-result", "--result-dir", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    assert path.name.startswith("mine-infqps-null-20")
    found = json.loads(path.read_text())
    assert (found["backend"], found["endpoint_type"], found["request_rate"]) == ("vllm", "vllm", "inf")
    ramp = [found[f"ramp_up_{key}"] for key in ("strategy", "start_rps", "end_rps")]
    assert ramp == ["linear", 200.0, 400.0]


def test_a_seed_repeats_the_whole_plan() -> None:
    given = ["--num-prompts", "20", "--request-rate", "5", "--random-range-ratio", "0.3", "--seed"]
    assert planned([*given, "1"], 512) == planned([*given, "1"], 512) != planned([*given, "2"], 512)


def test_the_vocabulary_is_that_of_the_folder_to_serve() -> None:
    requests = planned(["--num-prompts", "50", "--self-hosted", str(MODEL)], 1024)
    assert 1400 < max(token for request in requests for token in request.prompt if isinstance(token, int)) < 1472


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--request-rate", "-1"], "--request-rate must be positive or inf, got -1"),
        (["--request-rate", "nan"], "--request-rate must be positive"),
        (["--burstiness", "0"], "--burstiness must be a positive number, got 0"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1, got 0"),
        (["--num-warmups", "-1"], "--num-warmups must be at least 0, got -1"),
        (["--metadata", "gpu=h200", "h200"], "--metadata takes KEY=VALUE, got 'h200'"),
        (["--metadata", "host=mine"], "--metadata host=mine would hide what the file says itself"),
        (["--header", "=x"], "--header takes KEY=VALUE, got '=x'"),
        (["--extra-body", "[1]"], "--extra-body must be a JSON object, got '[1]'"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--goodput", "ttft:inf"], "--goodput takes NAME:MILLISECONDS"),
        (["--max-model-len", "0"], "--max-model-len must be at least 1, got 0"),
        (["--dataset-path", "/none"], "random prompts take no --dataset-path, got /none"),
        (
            ["--dataset-name", "foo"],
            "--dataset-name must be one of random, sharegpt, azure, burstgpt, mooncake, got",
        ),
        (["--workload", "bursts"], "no workload 'bursts'"),
        (["--workload", "azure"], "is of the azure format: give a file of it with --dataset-path"),
        (["--workload", "azure", "--dataset-path", "/none.csv"], "cannot read the dataset /none.csv"),
        (["--workload", "ramp", "--dataset-path", "/none.csv"], "takes no --dataset-path, got /none.csv"),
        (["--save-result", "--result-dir", "/dev/null/x"], "/dev/null is a file"),
        (["--ramp-up-strategy", "linear"], "a ramp needs all of"),
        (["--ramp-up-start-rps", "1"], "a ramp needs all of"),
        (["--goodput", "ttft=5"], "--goodput takes NAME:MILLISECONDS"),
        (["--percentile-metrics", "ttft,foo"], "--percentile-metrics must be one of ttft, tpot, itl, e2el, got 'foo'"),
        (["--metric-percentiles", "101"], "--metric-percentiles takes numbers from 0 to 100"),
        (["--metric-percentiles", "p99"], "got 'p99'"),
        (["--random-input-len", "0"], "--random-input-len must be at least 1, got 0"),
        (["--random-range-ratio", "2"], "--random-range-ratio must be in [0, 1), got 2"),
        (["--vocab-size", "0"], "--vocab-size must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
        (["--endpoint", "/v1/embeddings"], "--endpoint must be"),
        (["--base-url", "localhost:8000"], "--base-url must start with http://"),
        (["--server-args", "--devices 2"], "--server-args needs --self-hosted"),
        (["--self-hosted", "/none", "--server-args=--port=1"], "--server-args must leave out --port=1"),
        (["--self-hosted", "/none", "--server-args='"], "--server-args cannot be read: No closing quotation"),
        (["--self-hosted", "/none"], "is /none a model folder?"),
        (["--workload", "burst", "--dataset-name", "sharegpt"], "both say what is sent"),
        (["--base-url", "http://127.0.0.1:9"], "does not list its models"),
        (["--port", "9"], "http://127.0.0.1:9 does not list its models"),
        (["--host", "::1", "--port", "9"], "http://[::1]:9 does not list its models"),
    ],
)
def test_nonsense_is_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *given]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert error.count("\n") == 1 or error.startswith("starting a server")


@pytest.mark.parametrize("given", [["--request-rate", "fast"], ["--backend", "foo"], ["--base-url", "x", "--foo"]])
def test_options_that_do_not_exist_are_one_line(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *given])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_without_a_list_of_models_is_believed_to_have_the_one_that_is_named(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["serve", "--base-url", f"{url}/nowhere/", "--num-prompts", "2", "--random-input-len", "5"]
    assert main(given) == 2
    assert "or give --model" in capsys.readouterr().err
    assert main([*given, "--model", "m"]) == 1
    assert "2 requests failed: HTTP 404" in capsys.readouterr().err


def test_a_model_that_is_not_served_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base-url", url, "--model", "other"]) == 2
    assert f"{url} does not serve 'other', only null" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--self-hosted", str(MODEL), "--server-args=--max-model-len 0"]) == 2
    assert "the server ended with code 2 before it was ready" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_demo_model_serves_a_load_while_its_layout_is_watched(tmp_path: Path) -> None:
    given = ["serve", "--self-hosted", str(MODEL), "--num-prompts", "6", "--random-input-len", "20", "--ignore-eos"]
    given += ["--server-args=--devices 2 --layout 1+1 --layouts 1+1 --policy static -O 0 --served-model-name demo"]
    given += ["--random-output-len", "10", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "own"]
    assert main(given) == 0
    found: dict[str, Any] = json.loads((tmp_path / "own.json").read_text())
    assert (found["model_id"], found["completed"], found["failed"]) == ("demo", 6, 0)
    assert found["input_lens"] == [20] * 6
    assert found["output_lens"] == [10] * 6
    assert found["layout_timeline"] == [{"at": 0.0, "layout": "1+1"}]
    assert (found["layout_switches"], found["num_devices"], found["device_kind"]) == (0, 2, "cpu")
