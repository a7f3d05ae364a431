from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fly_jax import __version__
from fly_jax.errors import EngineDeadError
from fly_jax.outputs import EngineStats
from serving import ServerOptions
from tests.serving.scripted_engine import REPLY, ScriptedEngine

Client = Callable[..., httpx.AsyncClient]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            assert sample.labels["model_name"] == "scripted"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "fly-jax")
    assert client.models.retrieve("scripted") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_a_served_name_replaces_the_models_own(in_process: Client) -> None:
    async def ask() -> tuple[httpx.Response, ...]:
        async with in_process(options=ServerOptions(served_model_name="org/name")) as client:
            body = {"model": "org/name", "prompt": "hi"}
            old = {"model": "scripted", "prompt": "hi"}
            return (
                await client.get("/v1/models/org/name"),
                await client.post("/v1/completions", json=body),
                await client.post("/v1/completions", json=old),
            )

    card, answer, old = asyncio.run(ask())
    assert (card.json()["id"], card.json()["root"], card.json()["max_model_len"]) == ("org/name", "scripted", 512)
    assert answer.json()["model"] == "org/name"
    assert old.status_code == 404


def test_health_version_and_load(http: httpx.Client) -> None:
    health = http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert http.get("/version").json() == {"version": __version__}
    assert set(http.get("/load").json()) == {"server_load"}


def test_schema_is_served(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/layout", "/metrics"} <= set(paths)


def test_tokenize_and_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hé"}).json()
    assert tokens == {"count": 4, "max_model_len": 512, "tokens": [256, 104, 195, 169]}
    bare = http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] == len("[user] a\n[assistant] ")


@pytest.mark.parametrize("tokens", [[-1], [258], [10**30], ["a"], "abc", None])
def test_tokens_out_of_range(http: httpx.Client, tokens: object) -> None:
    answer = http.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tokens")


def test_a_scrape_after_some_work(in_process: Client) -> None:
    async def work() -> str:
        async with in_process() as client:
            await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 100})
            await client.post("/v1/completions", json={"prompt": ["hi", "hi"], "max_tokens": 5, "stream": True})
            await client.post("/layout", json={"layout": "4"})
            scrape = await client.get("/metrics")
            assert scrape.headers["content-type"].startswith("text/plain; version=")
            return scrape.text

    samples = samples_of(asyncio.run(work()))
    tokens = len(REPLY.encode())
    expected = {
        ("vllm:num_requests_running", ()): 0,
        ("vllm:num_requests_waiting", ()): 0,
        ("vllm:kv_cache_usage_perc", ()): 0.125,
        ("vllm:prompt_tokens_total", ()): 9,
        ("vllm:generation_tokens_total", ()): tokens + 10,
        ("vllm:num_preemptions_total", ()): 0,
        ("vllm:request_success_total", (("finished_reason", "stop"),)): 1,
        ("vllm:request_success_total", (("finished_reason", "length"),)): 2,
        ("vllm:time_to_first_token_seconds_count", ()): 3,
        ("vllm:inter_token_latency_seconds_count", ()): tokens - 1 + 4 + 4,
        ("vllm:e2e_request_latency_seconds_count", ()): 3,
        ("fly:layout_info", (("layout", "4"),)): 1,
        ("fly:switches_total", ()): 1,
        ("fly:switch_drain_seconds", ()): 0.25,
        ("fly:switch_cutover_seconds", ()): 0.01,
        ("fly:compiles_after_warmup", ()): 0,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert samples["vllm:time_to_first_token_seconds_sum", ()] <= samples["vllm:e2e_request_latency_seconds_sum", ()]


def test_applications_count_apart(in_process: Client) -> None:
    async def work() -> str:
        async with in_process() as busy, in_process() as idle:
            await busy.post("/v1/completions", json={"prompt": "hi"})
            return (await idle.get("/metrics")).text

    assert samples_of(asyncio.run(work()))["vllm:time_to_first_token_seconds_count", ()] == 0


class AwaitableStats(ScriptedEngine):
    """Statistics that live on another thread, and may be gone with it."""

    async def stats(self) -> EngineStats:
        if not self.is_alive:
            raise EngineDeadError("the engine has stopped")
        return await super().stats()


def test_statistics_may_be_awaited_and_may_be_gone(in_process: Client) -> None:
    engine = AwaitableStats()

    async def work() -> tuple[str, httpx.Response, httpx.Response]:
        async with in_process(engine) as client:
            before = (await client.get("/metrics")).text
            engine.is_alive = False
            return before, await client.get("/metrics"), await client.get("/layout")

    before, after, layout = asyncio.run(work())
    assert ("vllm:num_requests_running", ()) in samples_of(before)
    assert after.status_code == 200
    assert ("vllm:num_requests_running", ()) not in samples_of(after.text)
    assert ("vllm:e2e_request_latency_seconds_count", ()) in samples_of(after.text)
    assert (layout.status_code, layout.json()["error"]["code"]) == (503, "engine_dead")
