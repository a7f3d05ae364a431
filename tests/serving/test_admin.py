from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx
import pytest

from serving import ServerOptions
from serving.admin import is_loopback
from tests.serving.scripted_engine import ScriptedEngine

Client = Callable[..., httpx.AsyncClient]
KEYED = ServerOptions(api_key="user", admin_key="boss")


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


def test_switch_and_report(in_process: Client) -> None:
    async def ask() -> tuple[httpx.Response, ...]:
        async with in_process() as client:
            before = await client.get("/layout")
            return before, await client.post("/layout", json={"layout": "2+2"}), await client.get("/layout")

    before, switch, after = asyncio.run(ask())
    assert before.json() == {"layout": "1+1+1+1", "target_layout": None, "last_switch": None}
    assert switch.json() == {
        "source": "1+1+1+1",
        "target": "2+2",
        "strategy": "sequential",
        "drain_seconds": 0.25,
        "cutover_seconds": 0.01,
        "weight_bytes_moved": 0,
        "requests_moved": 0,
        "kv_bytes_moved": 0,
        "kv_blocks_moved": 0,
        "tokens_recomputed": 0,
        "requests_waiting": 0,
    }
    assert after.json() == {"layout": "2+2", "target_layout": None, "last_switch": switch.json()}


@pytest.mark.parametrize("layout", ["3+1", "", 5, None, "x" * 1000, ["2+2"], "\u0000"])
def test_bad_layout(in_process: Client, layout: object) -> None:
    answer = post_layout(in_process, layout=layout)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "layout"


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
