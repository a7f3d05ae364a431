from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fly_jax.bench.__main__ import main
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.sweep import AUTO, STATIC, Configuration, at_rate, static_layouts, within_widths


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


class ScriptedServer(BaseHTTPRequestHandler):
    """Answers as a fly-jax server of four devices that has no layout 2+1+1; notes what it was asked for."""

    layout = "2+2"
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        if self.path == "/layout":
            self._answer({"layout": self.layout, "last_switch": None, "switch_history": []})
        else:
            self._answer({"data": [{"id": "scripted", "max_model_len": 100}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/layout":
            self.asked.append(body)
            if body["layout"] == "2+1+1":
                self._answer({"error": {"message": "no group 2 here"}}, status=400)
                return
            type(self).layout = body["layout"]
            self._answer(body)
            return
        self.asked.append({"prompt": body["prompt"], "layout": self.layout})
        chunks = [
            {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]},
            {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 2}},
        ]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream", 200)

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
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it is asked for."""
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (ScriptedServer,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_every_configuration_gets_the_same_requests_and_the_first_layout_comes_back(
    server: tuple[str, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, asked = server
    arguments = f"sweep --base-url {url} --num-prompts 3 --random-input-len 5 --random-output-len 2 --seed 1"
    places = ["--save-result", "--result-dir", str(tmp_path), "--rate-scales", "1", "2", "--disable-tqdm"]
    places += ["--goodput", "ttft:60000", "--layouts", "dp4", "2+1+1", "2+2", "tp4"]
    assert main([*arguments.split(), *places]) == 0
    result = json.loads((tmp_path / "sweep-random.json").read_text())
    runs = [(run["configuration"], run["rate_scale"], run["completed"]) for run in result["runs"]]
    names = ("1+1+1+1", "2+2", "4", "auto")
    assert runs == [(name, scale, 3) for name in names for scale in (1.0, 2.0)]
    assert "left out 2+1+1: no group 2 here" in capsys.readouterr().err
    for run in result["runs"]:
        assert len(run["start_times"]) == len(run["ttfts"]) == 3
        assert "itls" not in run
        assert (run["error_counts"], run["goodput_limits_ms"]) == ({}, {"ttft": 60000.0})
    layouts = [body for body in asked if "policy" in body]
    assert layouts[-1] == {"layout": "2+2", "policy": "static"}
    assert {"layout": "1+1+1+1", "policy": "auto"} in layouts
    prompts: dict[str, set[str]] = defaultdict(set)
    for body in asked:
        if "prompt" in body:
            prompts[body["layout"]].add(str(body["prompt"]))
    assert len(prompts["4"]) == 3
    assert prompts["4"] == prompts["2+2"] == prompts["1+1+1+1"]
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".png", ".svg"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate-scales", "0"], "--rate-scales must be above 0, got 0"),
        (["--strategies", "migrate"], "--strategies migrate needs --self-hosted"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments]) == 2
    assert complaint in capsys.readouterr().err
