from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx
import pytest

from fly_jax.outputs import SwitchReport
from serving import ServerOptions
from serving.admin import MAX_HISTORY, is_loopback
from tests.serving.scripted_engine import ScriptedEngine

Client = Callable[..., httpx.AsyncClient]
KEYED = ServerOptions(api_keys=("user",), admin_key="boss")


def post_layout(
    in_process: Client,
    headers: Mapping[str, str] | None = None,
    *,
    options: ServerOptions | None = None,
    peer: str = "127.0.0.1",
    host: str = "localhost:8000",
    layout: object = "2+2",
) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with in_process(ScriptedEngine(), options, peer=peer, host=host) as client:
            return await client.post("/layout", json={"layout": layout}, headers=headers)

    return asyncio.run(ask())


REPORT = {
    "number": 1,
    "source": "1+1+1+1",
    "target": "2+2",
    "strategy": "migrate",
    "reason": "asked for",
    "drain_seconds": 0.25,
    "precopy_seconds": 0.125,
    "cutover_seconds": 0.01,
    "worst_gap_seconds": 0.5,
    "requests_moved": 0,
    "requests_paused": 0,
    "requests_adopted": 0,
    "kv_bytes_adopted": 0,
    "kv_bytes_moved": 4096,
    "kv_bytes_precopied": 0,
    "kv_blocks_moved": 0,
    "relayout_launches": 0,
    "tokens_recomputed": 3,
    "requests_waiting": 0,
    "settled": True,
}


def ask(
    in_process: Client, *bodies: Mapping[str, object] | None, engine: ScriptedEngine | None = None
) -> list[httpx.Response]:
    """Posts each body to one server, and reads the layout where there is None."""

    async def talk() -> list[httpx.Response]:
        async with in_process(engine) as client:
            return [
                await (client.get("/layout") if body is None else client.post("/layout", json=body)) for body in bodies
            ]

    return asyncio.run(talk())


def test_switch_and_report(in_process: Client) -> None:
    before, switch, after = ask(in_process, None, {"layout": "2+2"}, None)
    state: dict[str, object] = {
        "layout": "1+1+1+1",
        "target_layout": None,
        "policy": "load_adaptive",
        "strategy": "migrate",
        "last_decision": None,
        "decisions": {},
        "last_switch": None,
        "switch_history": [],
    }
    assert before.json() == state
    assert switch.json() == {**REPORT, "policy": "static"}
    switched = {"layout": "2+2", "policy": "static", "last_switch": REPORT, "switch_history": [REPORT]}
    assert after.json() == {**state, **switched}


def test_what_the_policy_decided_is_shown(in_process: Client) -> None:
    engine = ScriptedEngine()
    engine.decisions = {"widen: low load": 2, "narrow: queue grows": 1}
    [state] = ask(in_process, None, engine=engine)
    assert state.json()["decisions"] == {"widen: low load": 2, "narrow: queue grows": 1}
    assert state.json()["last_decision"] == "narrow: queue grows"


def test_only_the_latest_switches_are_listed(in_process: Client) -> None:
    count = MAX_HISTORY + 3
    state = ask(in_process, *[{"layout": "2+2"}] * count, None)[-1]
    assert [report["number"] for report in state.json()["switch_history"]] == list(range(4, count + 1))
    assert state.json()["last_switch"]["number"] == count


@pytest.mark.parametrize(
    ("body", "strategy", "policy"),
    [
        ({}, "migrate", "static"),
        ({"strategy": "sequential"}, "sequential", "static"),
        ({"strategy": "soft_preempt", "policy": "static"}, "soft_preempt", "static"),
        ({"strategy": "hard_preempt", "policy": "auto"}, "hard_preempt", "load_adaptive"),
        ({"policy": "load_adaptive"}, "migrate", "load_adaptive"),
        ({"strategy": None, "policy": None}, "migrate", "static"),
    ],
)
def test_a_switch_by_a_strategy_and_what_follows_it(
    in_process: Client, body: dict[str, object], strategy: str, policy: str
) -> None:
    switch, state = ask(in_process, {"layout": "2+2", **body}, None)
    assert switch.json() == {**REPORT, "strategy": strategy, "policy": policy}
    assert (state.json()["layout"], state.json()["policy"]) == ("2+2", policy)


def test_a_policy_alone_keeps_the_layout(in_process: Client) -> None:
    static, switch, auto, named, state = ask(
        in_process,
        {"policy": "static"},
        {"layout": "4"},
        {"policy": "auto", "layout": None, "strategy": None},
        {"policy": "load_adaptive"},
        None,
    )
    assert static.json() == {"layout": "1+1+1+1", "policy": "static"}
    assert switch.json()["policy"] == "static"
    assert auto.json() == named.json() == {"layout": "4", "policy": "load_adaptive"}
    assert [report["target"] for report in state.json()["switch_history"]] == ["4"]


@pytest.mark.parametrize("body", [{}, {"policy": "auto"}, {"layout": None}])
def test_a_strategy_without_a_layout_says_what_to_do(in_process: Client, body: dict[str, object]) -> None:
    answer, state = ask(in_process, {"strategy": "soft_preempt", **body}, None)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "strategy")
    assert "give the layout to go to with it" in answer.json()["error"]["message"]
    assert state.json()["policy"] == "load_adaptive"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", "adaptive", "policy must be one of auto, load_adaptive, static, got 'adaptive'"),
        ("policy", "", "policy must be one of auto, load_adaptive, static, got ''"),
        ("policy", 5, "policy: Input should be a valid string"),
        (
            "strategy",
            "drain",
            "strategy: Input should be 'migrate', 'sequential', 'soft_preempt' or 'hard_preempt'",
        ),
        ("strategy", [], "strategy: Input should be 'migrate', 'sequential', 'soft_preempt' or 'hard_preempt'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(
    in_process: Client, field: str, value: object, message: str
) -> None:
    answer, state = ask(in_process, {"layout": "2+2", field: value}, None)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (400, field, message)
    assert (state.json()["layout"], state.json()["policy"]) == ("1+1+1+1", "load_adaptive")


def test_a_policy_that_the_engine_cannot_follow(in_process: Client) -> None:
    """After a switch the answer also says that the switch itself was made."""
    engine = ScriptedEngine()
    engine.can_adapt = False
    alone, after, state = ask(in_process, {"policy": "auto"}, {"layout": "4", "policy": "auto"}, None, engine=engine)
    reason = "policy auto needs more than one layout: start again with more --layouts"
    expected = {"message": reason, "type": "invalid_request_error", "param": "policy", "code": "invalid_policy"}
    assert (alone.status_code, alone.json()["error"]) == (400, expected)
    expected["message"] = f"the layout is 4 now and stays: {reason}"
    assert (after.status_code, after.json()["error"]) == (400, expected)
    assert (state.json()["layout"], state.json()["policy"]) == ("4", "static")


def test_a_policy_is_guarded_as_a_layout_is(in_process: Client) -> None:
    async def post() -> httpx.Response:
        async with in_process(peer="10.0.0.1") as client:
            return await client.post("/layout", json={"policy": "static"})

    assert asyncio.run(post()).status_code == 403


@pytest.mark.parametrize("layout", ["3+1", "", 5, None, "x" * 1000, ["2+2"], "\u0000"])
def test_bad_layout(in_process: Client, layout: object) -> None:
    answer, state = ask(in_process, {"layout": layout}, None)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "layout"
    assert state.json()["policy"] == "load_adaptive"


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_local_peers_may_without_a_key(in_process: Client, peer: str) -> None:
    assert post_layout(in_process, peer=peer).status_code == 200


@pytest.mark.parametrize("peer", ["10.0.0.1", "192.168.1.5", "::ffff:10.0.0.1", "2001:db8::1", "localhost.evil.com"])
def test_other_peers_may_not(in_process: Client, peer: str) -> None:
    answer = post_layout(in_process, peer=peer)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host"])
def test_a_proxied_peer_is_not_local(in_process: Client, name: str) -> None:
    assert post_layout(in_process, {name: "127.0.0.1"}).status_code == 403


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"])
def test_a_rebound_name_is_not_local(in_process: Client, host: str) -> None:
    assert post_layout(in_process, host=host).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost.evil.example", "file://", ""])
@pytest.mark.parametrize("options", [None, KEYED])
def test_pages_of_other_hosts_may_not(in_process: Client, origin: str, options: ServerOptions | None) -> None:
    headers = {"Origin": origin, "X-API-Key": "boss"}
    assert post_layout(in_process, headers, options=options).status_code == 403


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8000", "https://[::1]:8000"])
def test_local_pages_may(in_process: Client, origin: str) -> None:
    assert post_layout(in_process, {"Origin": origin}).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/json5"])
def test_what_a_form_can_send_is_refused(in_process: Client, content_type: str) -> None:
    answer = post_layout(in_process, {"Content-Type": content_type})
    assert answer.status_code == 415


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer boss"}, {"X-API-Key": "boss"}])
def test_the_admin_key_works_from_anywhere(in_process: Client, headers: dict[str, str]) -> None:
    headers = {**headers, "X-Forwarded-For": "1.2.3.4"}
    answer = post_layout(in_process, headers, options=KEYED, peer="10.0.0.1", host="fly.example")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer user"}, {"X-API-Key": "user"}, {"Authorization": "boss"}, {"X-API-Key": ""},
     {"Authorization": "Basic boss"}, {"Authorization": "Bearer boss2"}, {"Authorization": "Bearer b\u00e6"}],
)  # fmt: skip
def test_with_an_admin_key_being_local_is_not_enough(in_process: Client, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = post_layout(in_process, encoded, options=KEYED)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_key")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "[::1]", "example.com", "127.0.0.1:80", "::", "1"])
def test_what_is_not_a_loopback_address(host: str) -> None:
    assert not is_loopback(host)


class OvertakenEngine(ScriptedEngine):
    """Somebody else pins another layout right after each switch; a policy set apart would undo that."""

    async def switch(self, layout: str, strategy: str | None = None, policy: str | None = None) -> SwitchReport:
        report = await super().switch(layout, strategy, policy)
        self.switch_now("1+1+1+1")
        return report


def test_a_switch_and_its_policy_are_one_thing_to_those_that_follow(in_process: Client) -> None:
    engine = OvertakenEngine()
    switch, state = ask(in_process, {"layout": "4", "policy": "auto"}, None, engine=engine)
    assert (switch.json()["target"], switch.json()["policy"]) == ("4", "load_adaptive")
    assert (state.json()["layout"], state.json()["policy"]) == ("1+1+1+1", "static")
