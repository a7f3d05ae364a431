from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from fly_jax.errors import ClientQueueFullError, QueueFullError
from serving import ServerOptions
from serving.byte_budget import ByteBudget
from serving.middleware import UNCOUNTED_BYTES, LimitBody, OneByOne

Client = Callable[..., httpx.AsyncClient]
KEYED = ServerOptions(api_keys=("key", "key of another"))


def ask(
    in_process: Client, method: str, path: str, headers: dict[str, str], options: ServerOptions | None = None
) -> httpx.Response:
    async def send() -> httpx.Response:
        async with in_process(options=options) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
     ("POST", "/detokenize"), ("GET", "/openapi.json"), ("GET", "/v1/../v1/models"), ("GET", "/nothing")],
)  # fmt: skip
@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Bearer key2", "Basic key", "key"])
def test_everything_but_the_probes_asks_for_the_key(in_process: Client, method: str, path: str, given: str) -> None:
    answer = ask(in_process, method, path, {"Authorization": given}, KEYED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/version", "/load", "/metrics", "/layout"])
def test_probes_need_no_key(in_process: Client, path: str) -> None:
    assert ask(in_process, "GET", path, {}, KEYED).status_code == 200


@pytest.mark.parametrize("given", ["Bearer key", "bearer key", "Bearer  key ", "Bearer key of another"])
def test_the_key_opens(in_process: Client, given: str) -> None:
    assert ask(in_process, "GET", "/v1/models", {"Authorization": given}, KEYED).status_code == 200


def test_a_plain_request_id_comes_back(in_process: Client) -> None:
    assert ask(in_process, "GET", "/health", {"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a/b"])
def test_any_other_is_replaced(in_process: Client, given: str) -> None:
    found = ask(in_process, "GET", "/health", {"X-Request-Id": given}).headers["x-request-id"]
    assert found != given
    assert len(found) == 32


def test_the_headers_id_names_the_answer(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Id": "from-header"})
    assert answer.json()["id"] == "cmpl-from-header"


def test_keys_do_not_show_in_the_options() -> None:
    assert "secret" not in repr(ServerOptions(api_keys=("secret-1",), admin_key="secret-2"))


PAGE = {"Origin": "https://page.example"}
PREFLIGHT = {**PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_pages_of_other_origins_read_nothing_by_default(in_process: Client) -> None:
    assert "access-control-allow-origin" not in ask(in_process, "GET", "/v1/models", PAGE).headers
    assert ask(in_process, "OPTIONS", "/v1/completions", PREFLIGHT).status_code == 405


@pytest.mark.parametrize(
    ("allowed", "answered"),
    [(("*",), "*"), (("https://page.example",), "https://page.example"), (("https://other.example",), None)],
)
def test_pages_of_allowed_origins_ask_before_they_have_shown_a_key(
    in_process: Client, allowed: tuple[str, ...], answered: str | None
) -> None:
    options = ServerOptions(api_keys=("key",), allowed_origins=allowed)
    preflight = ask(in_process, "OPTIONS", "/v1/completions", PREFLIGHT, options)
    refused = ask(in_process, "GET", "/v1/models", PAGE, options)
    assert preflight.status_code == (400 if answered is None else 200)
    assert refused.status_code == 401
    for answer in (preflight, refused):
        assert answer.headers.get("access-control-allow-origin") == answered
        assert "access-control-allow-credentials" not in answer.headers


def test_a_page_of_an_allowed_origin_changes_no_layout(in_process: Client) -> None:
    headers = {**PAGE, "Content-Type": "application/json"}
    assert ask(in_process, "POST", "/layout", headers, ServerOptions(allowed_origins=("*",))).status_code == 403


def test_requests_that_come_at_once_are_let_in_one_a_pass_and_health_passes_by() -> None:
    entered: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        entered.append(scope["path"])

    async def nothing(*_: object) -> Any:
        raise AssertionError("nobody reads or writes")

    async def work() -> None:
        gate = OneByOne(app)
        scopes = [{"type": "http", "path": f"/{number}"} for number in range(50)] + [
            {"type": "http", "path": "/health"}
        ]
        tasks = [asyncio.create_task(gate(scope, nothing, nothing)) for scope in scopes]
        seen = []
        while len(entered) < len(scopes):
            await asyncio.sleep(0)
            seen.append(len(entered))
        assert entered[0] == "/health"
        assert entered[1:] == [scope["path"] for scope in scopes[:-1]]
        assert max(after - before for before, after in pairwise(seen)) == 1
        await asyncio.gather(*tasks)

    asyncio.run(work())


def test_a_body_whose_length_is_told_twice_is_refused(in_process: Client) -> None:
    async def send() -> httpx.Response:
        async with in_process() as client:
            headers = {"Content-Length": "2", "Transfer-Encoding": "chunked", "Content-Type": "application/json"}
            return await client.request("POST", "/v1/completions", headers=headers, content=b"{}")

    answer = asyncio.run(send())
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")
    assert "either Content-Length or Transfer-Encoding" in answer.json()["error"]["message"]


def test_bodies_that_are_being_received_have_so_much_room_in_all() -> None:
    """Two clients send more than there is room for, but for what is not counted; then there is room again."""
    budget = ByteBudget(100, "bodies are held until they have been read")
    received: list[bytes] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        received.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert not budget.total
        await send({"type": "http.response.body"})

    limit = LimitBody(app, 10**6, budget, lambda request: request.headers["client"])

    class Upload:
        def __init__(self, client: str) -> None:
            scope = {"type": "http", "path": "/", "headers": [(b"client", client.encode())]}
            self.parts: asyncio.Queue[Message] = asyncio.Queue()
            self.task = asyncio.create_task(limit(scope, self.parts.get, self.send))

        async def send(self, _message: Message) -> None:
            pass

        async def give(self, size: int, more: bool = True) -> Upload:
            await self.parts.put({"type": "http.request", "body": b"x" * size, "more_body": more})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return self

    async def work() -> None:
        first = await Upload("one").give(UNCOUNTED_BYTES + 60)
        assert budget.total == 60
        again = await Upload("one").give(UNCOUNTED_BYTES)
        assert budget.total == 60
        await again.give(1)
        with pytest.raises(ClientQueueFullError, match="60 bytes of your bodies are held"):
            await again.task
        other = await (await Upload("two").give(UNCOUNTED_BYTES)).give(41)
        with pytest.raises(QueueFullError, match=r"60 bytes of bodies are held .* 41 more they would be over 100"):
            await other.task
        await first.give(40, more=False)
        await first.task
        assert [len(body) for body in received] == [UNCOUNTED_BYTES + 100]
        assert not budget.held

    asyncio.run(work())
