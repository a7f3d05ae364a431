"""The demo against a real server with a scripted engine that knows the answers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest

from checkpoints.demo.text import recall_prompt
from fly_jax.cli.main import main
from fly_jax.errors import FlyJaxError
from fly_jax.outputs import EngineStats
from fly_jax.sampling_params import SamplingParams
from serving import ServerOptions, demo
from serving.demo import FACTS, LAYOUTS, run_demo
from tests.serving.live import live_server
from tests.serving.scripted_engine import ScriptedEngine


class RecallEngine(ScriptedEngine):
    """Answers the demo's recall questions; ``on_reply`` and ``on_stats`` may do something else first."""

    def __init__(self) -> None:
        super().__init__(max_model_len=100_000)
        self.answers: dict[str, str] = {}
        self.on_reply: Callable[[], None] = lambda: None
        self.on_stats: Callable[[], None] = lambda: None
        self._numbers = itertools.count(step=2)

    def _reply(self, prompt: str, params: SamplingParams) -> str:
        self.on_reply()
        if "Question:" not in prompt:
            return super()._reply(prompt, params)
        while prompt not in self.answers:
            task = recall_prompt(f"demo-{next(self._numbers)}", FACTS)
            self.answers[task.prompt] = task.answer
        return self.answers[prompt]

    def latest_stats(self) -> EngineStats:
        self.on_stats()
        return super().latest_stats()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RecallEngine:
    monkeypatch.setattr(demo, "SECONDS_A_LAYOUT", 0.1)
    return RecallEngine()


@pytest.mark.parametrize("policy", ["load_adaptive", "static"])
@pytest.mark.parametrize("strategy", [None, "hard_preempt"])
def test_nothing_is_lost_and_the_policy_is_left_as_found(
    engine: RecallEngine, policy: str, strategy: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.policy = policy
    arguments = [] if strategy is None else ["--switch-strategy", strategy]
    with live_server(engine) as server:
        assert main(["demo", "--url", server.url, "--requests", "3", *arguments]) == 0
    assert [report.target for report in engine.switch_reports] == [LAYOUTS[0], *LAYOUTS]
    assert {report.strategy for report in engine.switch_reports} == {strategy or "migrate"}
    assert engine.policy == policy
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"(\d+) requests finished, none lost; \d+ were in flight .* recall answers: (\d+) of (\d+) right", out
    )
    assert found is not None
    assert int(found[1]) == sum(engine.finished.values())
    assert found[2] == found[3]


def test_the_table_shows_what_each_switch_cost(engine: RecallEngine, capsys: pytest.CaptureFixture[str]) -> None:
    """The worst gap has grown since the switch was reported."""

    def outgrow() -> None:
        if engine.layout == "2+2":
            engine.outgrow_last_gap(0.75)

    engine.on_stats = outgrow  # the demo looks once more at the end of each layout
    with live_server(engine) as server:
        assert run_demo(server.url, 3, None) == 0
    _, table = capsys.readouterr().out.split("tok/s")
    rows = [line.split() for line in table.splitlines() if line.split()[4:]]
    assert [row[:4] for row in rows[:4]] == [
        ["1+1+1+1", "250.0", "10.00", "500"],
        ["2+2", "250.0", "10.00", "750"],
        ["4", "250.0", "10.00", "500"],
        ["1+1+1+1", "250.0", "10.00", "500"],
    ]


def test_a_failed_request_ends_the_demo_and_the_policy_is_still_left_as_found(
    engine: RecallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SECONDS_A_LAYOUT", 3600)  # nothing else ends it

    def fail() -> None:
        if len(engine.switch_reports) == 2:
            raise RuntimeError("secret internals")

    engine.on_reply = fail
    with live_server(engine) as server, pytest.raises(FlyJaxError, match=r"^a request failed: .*internal error"):
        run_demo(server.url, 3, None)
    assert engine.policy == "load_adaptive"


def test_a_refused_switch_is_one_line(engine: RecallEngine, capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(engine, ServerOptions(admin_key="boss")) as server:
        assert main(["demo", "--url", server.url, "--requests", "3"]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert "the server refused layout 1+1+1+1" in line
        assert "admin key" in line
        assert main(["demo", "--url", server.url, "--requests", "3", "--admin-key", "boss"]) == 0
    assert engine.policy == "load_adaptive"


@pytest.mark.parametrize("requests", ["0", "-3"])
def test_a_burst_of_no_requests_is_one_line(requests: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", requests]) == 2
    assert capsys.readouterr().err == f"fly-jax: error: --requests must be at least 1, got {requests}\n"
