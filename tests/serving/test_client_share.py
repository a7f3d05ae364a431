"""Who counts as one client, and what it holds of the queue over HTTP, with the real engine over a simulated runner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import httpx
import pytest

from fly_jax import AsyncEngine
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.results import StepResults
from serving import ServerOptions
from tests.fly_jax.simulated_runner import SimulatedRunner, simulated_engine
from tests.serving.live import eventually, live_server
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.test_disconnect import post_raw

Client = Callable[..., httpx.AsyncClient]
ONE_KEY, TWO_KEYS = ServerOptions(api_keys=("one",)), ServerOptions(api_keys=("one", "two"))
BODY = {"prompt": [1, 2, 3], "max_tokens": 8}


def names_of(in_process: Client, options: ServerOptions, peer: str, headers: Sequence[dict[str, str]]) -> list[str]:
    """What the engine is told of requests with these headers."""
    engine = ScriptedEngine()

    async def ask() -> None:
        async with in_process(engine, options, peer=peer) as client:
            for each in headers:
                answer = await client.post("/v1/completions", json={"prompt": "hi"}, headers=each)
                assert answer.status_code == 200

    asyncio.run(ask())
    return [str(client) for client in engine.clients.values()]


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("a socket's path", "a socket's path"),
    ],
)
def test_a_client_is_its_address_whatever_it_says_of_itself(in_process: Client, peer: str, name: str) -> None:
    headers = [{}, {"Authorization": "Bearer made up"}, {"X-Forwarded-For": "198.51.100.7"}]
    assert names_of(in_process, ServerOptions(), peer, headers) == [name] * 3


def test_with_several_keys_a_client_is_its_key_and_with_one_its_address(in_process: Client) -> None:
    keyed = [{"Authorization": f"Bearer {key}"} for key in ("two", "one", "two")]
    assert names_of(in_process, TWO_KEYS, "192.0.2.1", keyed) == ["key 1", "key 0", "key 1"]
    assert names_of(in_process, ONE_KEY, "192.0.2.1", keyed[1:2]) == ["192.0.2.1"]


class Endless(SimulatedRunner):
    """What it computes never reaches the host: a request that has started runs until its client leaves."""

    def compute(self, launch: Launch) -> StepResults:
        super().compute(launch)
        return StepResults()


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    """One request runs, as there are blocks for no more, and of each client two may wait."""
    simulated, _ = simulated_engine(
        layout="4", num_blocks=1, max_queued=8, queued_per_client=2, patience=10**9, runner_type=Endless
    )
    engine = AsyncEngine(simulated)
    yield engine
    engine.close()


def test_one_client_cannot_fill_the_queue_and_what_leaves_it_makes_room(engine: AsyncEngine) -> None:
    def waiting(count: int) -> bool:
        return eventually(lambda: engine.latest_stats().waiting == count)

    with live_server(engine, TWO_KEYS) as server, ExitStack() as connections:

        def send(key: str) -> Callable[[], None]:
            return connections.enter_context(post_raw(server, "/v1/completions", BODY, key=key)).close

        def refused(**fields: object) -> httpx.Response:
            return server.http.post("/v1/completions", json=BODY | fields, headers={"Authorization": "Bearer one"})

        send("one")
        assert eventually(lambda: engine.latest_stats().running == 1)
        leave = [send("one"), send("one")]
        assert waiting(2)
        for stream in (False, True):
            answer = refused(stream=stream)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.json()["error"]["message"].startswith("2 of your requests are waiting and at most 2 of one")
        send("two")
        assert waiting(3)
        leave[0]()
        assert waiting(2)
        send("one")
        assert waiting(3)
        too_many = refused(n=3)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
        assert "more than the 2 requests that one client can queue" in too_many.json()["error"]["message"]
        connections.close()
        assert eventually(lambda: (engine.latest_stats().running, engine.latest_stats().waiting) == (0, 0))
        assert engine.latest_stats().free_blocks == (engine.latest_stats().num_blocks,) * 4
