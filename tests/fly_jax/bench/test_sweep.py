from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from checkpoints.demo import MODEL
from fly_jax.bench import pictures, sweep
from fly_jax.bench.__main__ import main
from fly_jax.bench.arrivals import arrival_times
from fly_jax.bench.client import COMPLETIONS, Target
from fly_jax.bench.load import LoadOptions, LoadResult, run_load
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.serve import Server
from fly_jax.bench.serve_run import ServeRun
from fly_jax.bench.served_model import ServedModel
from fly_jax.bench.server_layouts import Configuration
from fly_jax.bench.sweep import at_rate, static_layouts, within_widths
from fly_jax.errors import ConfigError
from fly_jax.policy.names import AUTO, STATIC


def test_every_mix_of_degrees_is_named_once() -> None:
    assert static_layouts(1) == ["1"]
    assert static_layouts(2) == ["1+1", "2"]
    assert static_layouts(4) == ["1+1+1+1", "2+1+1", "2+2", "4"]
    assert static_layouts(6) == ["1+1+1+1+1+1", "2+1+1+1+1", "2+2+1+1", "2+2+2", "4+1+1", "4+2"]
    assert len(static_layouts(8)) == len(set(static_layouts(8))) == 10


def test_twice_the_rate_is_half_the_time_for_the_same_requests() -> None:
    planned = [PlannedRequest(at, (1, 2), 2, 3) for at in (0.0, 1.0, 3.0)]
    faster = at_rate(planned, 2.0)
    assert [request.at for request in faster] == [0.0, 0.5, 1.5]
    assert [request.prompt for request in faster] == [request.prompt for request in planned]


def test_a_pinned_layout_is_not_asked_for_widths_that_it_has_not() -> None:
    planned = [PlannedRequest(0.0, (1, 2), 2, 3, tensor_parallel_size=width) for width in (None, 1, 2, 4)]
    for layout, policy, widths in (
        ("1+1+1+1", STATIC, [None, 1, None, None]),
        ("2+1+1", STATIC, [None, 1, 2, None]),
        ("4", STATIC, [None, 1, 2, 4]),
        ("1+1+1+1", AUTO, [None, 1, 2, 4]),
    ):
        sent, narrowed = within_widths(planned, Configuration(layout, policy, None))
        assert [request.tensor_parallel_size for request in sent] == widths
        assert narrowed == sum(
            before.tensor_parallel_size != after for before, after in zip(planned, widths, strict=True)
        )


@dataclass
class Scripted:
    """A fly-jax server of four devices that has no layout 2+1+1, and what it was asked for.

    Attributes:
        keys: what came with each change of the layout.
        on_layout: hears of each layout asked for, before it is answered.
        on_prompt: hears of the layout in which each prompt comes, before it is answered.
        dead: answers no further change of the layout.
        failing: layout in which no request is answered.
    """

    url: str = ""
    layout: str = "2+2"
    policy: str = "auto"
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    on_layout: Callable[[str], None] = lambda _: None
    on_prompt: Callable[[str], None] = lambda _: None
    dead: bool = False
    failing: str = ""

    @property
    def changes(self) -> list[tuple[str, str]]:
        """Each layout and policy that was asked for."""
        return [(body["layout"], body["policy"]) for body in self.asked if "policy" in body]


class ScriptedHandler(BaseHTTPRequestHandler):
    scripted: Scripted

    def do_GET(self) -> None:
        state = self.scripted
        if self.path == "/layout":
            self._answer({"layout": state.layout, "policy": state.policy, "last_switch": None, "switch_history": []})
        else:
            self._answer({"data": [{"id": "scripted", "max_model_len": 100}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/layout":
            self._set_layout(body)
            return
        self.scripted.asked.append({"prompt": body.get("prompt"), "layout": self.scripted.layout})
        self.scripted.on_prompt(self.scripted.layout)
        if self.scripted.layout == self.scripted.failing:
            self._answer({"error": {"message": "out of order"}}, status=500)
            return
        chunks = [
            {"choices": [{"index": 0, "text": "a", "delta": {"content": "a"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "b", "delta": {"content": "b"}, "finish_reason": "length"}]},
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
        ]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream", 200)

    def _set_layout(self, body: dict[str, Any]) -> None:
        state = self.scripted
        state.asked.append(body)
        state.keys.append(self.headers["Authorization"])
        state.on_layout(body["layout"])
        if state.dead:
            return  # without an answer, and the connection is closed
        if body["layout"] == "2+1+1":
            self._answer({"error": {"message": "no group 2 here"}}, status=400)
            return
        state.layout, state.policy = body["layout"], body["policy"]
        self._answer(body)

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    handler = type("Handler", (ScriptedHandler,), {"scripted": scripted})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        scripted.url = f"http://127.0.0.1:{running.server_port}"
        yield scripted
        running.shutdown()
        thread.join()


def swept(server: Scripted, folder: Path, *more: str) -> int:
    """The exit code of a sweep with three short prompts whose result is saved."""
    given = ["sweep", "--base-url", server.url, "--num-prompts", "3", "--random-input-len", "5", "--seed", "1"]
    given += ["--random-output-len", "2", "--disable-tqdm", "--save-result", "--result-dir", str(folder)]
    return main([*given, *more])


def saved(folder: Path) -> list[dict[str, Any]]:
    """The runs in the file that a sweep has written."""
    runs: list[dict[str, Any]] = json.loads((folder / "sweep-random.json").read_text())["runs"]
    return runs


def names(folder: Path) -> list[str]:
    return [run["configuration"] for run in saved(folder)]


@pytest.mark.slow
def test_every_configuration_gets_the_same_requests_at_every_rate(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--rate-scales", "1", "2", "--request-rate", "200", "--goodput", "ttft:60000"]
    assert swept(server, tmp_path, *more, "--layouts", "dp4", "2+1+1", "2+2", "tp4") == 0
    runs = [(run["configuration"], run["request_rate"], run["completed"]) for run in saved(tmp_path)]
    assert runs == [(name, rate, 3) for name in ("1+1+1+1", "2+2", "4", "auto") for rate in (200.0, 400.0)]
    assert "left out 2+1+1: no group 2 here" in capsys.readouterr().err
    for run in saved(tmp_path):
        assert len(run["start_times"]) == len(run["ttfts"]) == 3
        assert "itls" not in run
        assert (run["error_counts"], run["goodput_limits_ms"]) == ({}, {"ttft": 60000.0})
    assert ("1+1+1+1", "auto") in server.changes
    prompts: dict[str, set[str]] = defaultdict(set)
    for body in server.asked:
        if "prompt" in body:
            prompts[body["layout"]].add(str(body["prompt"]))
    assert len(prompts["4"]) == 3
    assert prompts["4"] == prompts["2+2"] == prompts["1+1+1+1"]
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".png", ".svg"}


@pytest.mark.slow
def test_four_times_the_rate_sends_four_times_as_early(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    due: list[list[float]] = []

    def noted(planned: Sequence[PlannedRequest], target: Target, options: LoadOptions) -> LoadResult:
        due.append([request.at for request in planned])
        return run_load(planned, target, options)

    monkeypatch.setattr(sweep, "run_load", noted)
    given = ["--policies", "static", "--layouts", "4", "--request-rate", "1", "--rate-scales", "1", "4"]
    assert swept(server, tmp_path, *given) == 0
    slow, fast = saved(tmp_path)
    assert (slow["request_rate"], fast["request_rate"]) == (1.0, 4.0)
    assert due == [[at / scale for at in arrival_times(3, 1.0, 1.0, 1)] for scale in (1.0, 4.0)]
    for run, times in zip((slow, fast), due, strict=True):
        # Never early; late by what a busy machine takes.
        assert all(start >= at - 0.001 for start, at in zip(run["start_times"], times, strict=True))


@pytest.mark.parametrize("policy", ["auto", "static"])
def test_the_layout_and_the_policy_of_a_running_server_come_back(server: Scripted, tmp_path: Path, policy: str) -> None:
    server.policy = policy
    assert swept(server, tmp_path, "--layouts", "4") == 0
    assert server.changes == [("4", "static"), ("4", "auto"), ("2+2", policy)]


def test_a_server_that_dies_leaves_what_it_did_before(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(layout: str) -> None:
        server.dead = server.dead or layout == "4"

    server.on_layout = die
    assert swept(server, tmp_path, "--layouts", "1+1+1+1", "2+2", "4") == 2
    assert names(tmp_path) == ["1+1+1+1", "2+2"]
    printed = capsys.readouterr()
    assert "1+1+1+1" in printed.out
    assert "layout 2+2 with policy auto was not restored" in printed.err
    last = printed.err.splitlines()[-1]
    assert f"POST {server.url}/layout to 4 failed" in last


def press_ctrl_c(layout: str) -> None:
    if layout == "4":
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.usefixtures("python_s_sigint")
def test_ctrl_c_during_a_run_keeps_its_part_and_begins_no_other(server: Scripted, tmp_path: Path) -> None:
    """The first request presses it; the others would not leave for five minutes."""
    server.on_prompt = press_ctrl_c
    given = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "1000", "--ramp-up-end-rps", "1e-9"]
    assert swept(server, tmp_path, "--layouts", "4", "2+2", *given) == 130
    assert [(run["configuration"], run["interrupted"]) for run in saved(tmp_path)] == [("4", True)]
    assert server.changes == [("4", "static"), ("2+2", "auto")]


@pytest.mark.usefixtures("python_s_sigint")
def test_ctrl_c_during_a_switch_keeps_what_was_measured_and_restores_the_server(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on_layout = press_ctrl_c
    assert swept(server, tmp_path, "--layouts", "1+1+1+1", "4", "2+2") == 130
    assert names(tmp_path) == ["1+1+1+1"]
    assert "1+1+1+1" in capsys.readouterr().out
    assert server.changes[-1] == ("2+2", "auto")


def test_a_sweep_that_measured_nothing_says_so_and_writes_nothing(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(server, tmp_path, "--layouts", "2+1+1") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "nothing was measured: the server has none of these layouts"
    assert printed.out == ""
    assert not list(tmp_path.iterdir())
    assert server.changes[-1] == ("2+2", "auto")


def test_a_configuration_that_answers_nothing_shows_no_latencies(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failing = "4"
    assert swept(server, tmp_path, "--policies", "static", "--layouts", "4", "2+2") == 1
    lines = capsys.readouterr().out.splitlines()
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("│").split("│")] for line in lines)}
    assert cells["4"] == ["x1", "0", "3", "-", "-", "-", "-", "0", "-", "0"]
    assert "-" not in cells["2+2"][:7]
    assert [run["p50_ttft_ms"] == 0 for run in saved(tmp_path)] == [True, False]  # as vLLM's files have it


@pytest.mark.slow
def test_the_admin_key_is_the_option_s_or_the_environment_s(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--policies", "static", "--layouts", "4"]
    for environment, more, key in (
        ("", [], None),
        ("from-environment", [], "Bearer from-environment"),
        ("from-environment", ["--admin-key", "given"], "Bearer given"),
    ):
        monkeypatch.setenv("FLY_JAX_ADMIN_KEY", environment)
        assert swept(server, tmp_path, *given, *more) == 0
        assert server.keys[-2:] == [key, key]


def test_chats_are_sent_as_text(server: Scripted, tmp_path: Path) -> None:
    assert swept(server, tmp_path, "--policies", "static", "--layouts", "4", "--backend", "openai-chat") == 0
    assert [run["completed"] for run in saved(tmp_path)] == [3]


@pytest.fixture
def started(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each server that is started; all are the scripted one, and ``soft_preempt`` does not start."""
    servers: list[list[str]] = []

    @contextlib.contextmanager
    def serving(_: argparse.Namespace, checked: ServeRun) -> Iterator[Server]:
        servers.append(checked.server_arguments)
        if "soft_preempt" in checked.server_arguments:
            raise ConfigError("the server ended with code 2 before it was ready")
        yield Server(Target(server.url, "scripted", COMPLETIONS), ServedModel("scripted", 100))

    monkeypatch.setattr(sweep, "serving", serving)
    return servers


def self_hosted(folder: Path, *more: str) -> int:
    given = ["sweep", "--self-hosted", str(MODEL), "--num-prompts", "2", "--random-input-len", "5", "--disable-tqdm"]
    given += ["--random-output-len", "2", "--save-result", "--result-dir", str(folder), "--server-args=--seed 1"]
    return main([*given, "--layouts", "4", *more])


def test_each_strategy_has_a_server_and_the_first_runs_the_static_layouts(
    server: Scripted, started: list[list[str]], tmp_path: Path
) -> None:
    assert self_hosted(tmp_path, "--strategies", "migrate", "sequential", "migrate") == 0
    assert started == [["--seed", "1", "--switch-strategy", each] for each in ("migrate", "sequential")]
    assert names(tmp_path) == ["4", "auto (migrate)", "auto (sequential)"]
    assert [run["strategy"] for run in saved(tmp_path)] == [None, "migrate", "sequential"]
    # A server that is stopped needs its layout no more.
    assert server.changes == [("4", "static"), ("4", "auto"), ("4", "auto")]


def test_without_auto_one_server_is_enough(started: list[list[str]], tmp_path: Path) -> None:
    assert self_hosted(tmp_path, "--policies", "static") == 0
    assert started == [["--seed", "1"]]
    assert names(tmp_path) == ["4"]


def test_a_server_that_does_not_start_leaves_what_others_did(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert self_hosted(tmp_path, "--strategies", "sequential", "soft_preempt", "migrate") == 2
    assert len(started) == 2
    assert names(tmp_path) == ["4", "auto (sequential)"]
    assert "the server ended with code 2" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_demo_model_is_swept_on_a_server_for_each_strategy(tmp_path: Path) -> None:
    given = ["sweep", "--self-hosted", str(MODEL), "--num-prompts", "3", "--random-input-len", "9", "--ignore-eos"]
    given += ["--server-args=--devices 2 --layouts 1+1 --max-num-seqs 4 --max-num-batched-tokens 128 -O 0"]
    given += ["--random-output-len", "4", "--layouts", "1+1", "2", "--strategies", "migrate", "sequential"]
    assert main([*given, "--save-result", "--result-dir", str(tmp_path)]) == 0
    assert names(tmp_path) == ["1+1", "auto (migrate)", "auto (sequential)"]
    for run in saved(tmp_path):
        assert (run["completed"], run["failed"], run["layout_timeline"]) == (3, 0, [{"at": 0.0, "layout": "1+1"}])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate-scales", "1", "2"], "--rate-scales 1 2: there is no rate, since all is sent at once"),
        (["--rate-scales", "0"], "--rate-scales must be finite and above 0, got 0"),
        (["--rate-scales", "1", "inf"], "--rate-scales must be finite and above 0, got inf"),
        (["--rate-scales", "1", "nan"], "--rate-scales must be finite and above 0, got nan"),
        (["--strategies", "migrate"], "--strategies migrate needs --self-hosted"),
        (
            ["--strategies", "migrate", "--policies", "static"],
            "--strategies migrate needs auto, and --policies is static",
        ),
        (["--save-result", "--result-dir", f"{__file__}/x"], "--result-dir: "),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_what_cannot_be_drawn_is_known_before_a_server_is_asked(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    assert swept(server, tmp_path) == 2
    assert "pictures need matplotlib" in capsys.readouterr().err
    assert not server.asked
