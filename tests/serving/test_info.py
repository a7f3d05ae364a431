from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fly_jax import __version__
from fly_jax.errors import ConfigError, EngineDeadError
from fly_jax.outputs import EngineStats
from serving import ServerOptions, create_app
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
        async with in_process(options=ServerOptions(served_model_names=("org/name",))) as client:
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


def test_every_served_name_is_listed_and_answers_by_the_first(in_process: Client) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with in_process(options=ServerOptions(served_model_names=("org/name", "short"))) as client:
            listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
            bodies = [{"model": name, "prompt": "hi"} for name in ("short", "org/name", "", None)]
            answers = [await client.post("/v1/completions", json=body) for body in bodies]
            return listed, [answer.json()["model"] for answer in answers]

    assert asyncio.run(ask()) == (["org/name", "short"], ["org/name"] * 4)


def test_no_served_name_is_empty() -> None:
    with pytest.raises(ConfigError, match="served_model_name must not be empty"):
        ServerOptions(served_model_names=("a", ""))


@pytest.mark.parametrize(
    "path", ["/health", "/version", "/load", "/metrics", "/v1/models", "/v1/models/scripted", "/layout"]
)
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    head = http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.get("content-type") == http.get(path).headers.get("content-type")


def test_health_version_and_load(http: httpx.Client) -> None:
    health = http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert http.get("/version").json() == {"version": __version__}
    assert set(http.get("/load").json()) == {"server_load"}


class Stuck(ScriptedEngine):
    """Its thread is in a step for ever: nobody who asks it is answered."""

    async def stats(self) -> EngineStats:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


def test_a_stuck_engine_is_unhealthy_and_its_counters_are_answered_until_it_goes_on(in_process: Client) -> None:
    engine = Stuck()

    async def work() -> None:
        async with in_process(engine) as client:
            engine.stuck_seconds = 61.4
            health = await client.get("/health")
            assert health.status_code == 503
            error = health.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "engine_stuck")
            assert error["message"].startswith("the engine has finished no step for 61 s although there is work")
            assert ("vllm:num_requests_running", ()) in samples_of((await client.get("/metrics")).text)
            assert (await client.get("/layout")).json()["layout"] == "1+1+1+1"
            engine.stuck_seconds = None
            assert (await client.get("/health")).status_code == 200
            engine.is_alive = False
            dead = await client.get("/health")
            assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_dead")

    asyncio.run(work())


def test_schema_is_served(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/layout", "/metrics"} <= set(paths)


def document_of(options: ServerOptions) -> dict[str, Any]:
    return create_app(ScriptedEngine(), options).openapi()


def test_the_schema_promises_the_errors_that_there_are() -> None:
    document = document_of(ServerOptions())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            assert "422" not in responses
            assert {"413", "500", "503"} <= set(responses)
            if method == "post":
                assert responses["400"]["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/Error"
                }
            assert ("404" in responses) == (
                path.startswith(("/v1/chat", "/v1/comp", "/v1/models/")) or "tokenize" in path
            )
            assert ("429" in responses) == (path in ("/v1/completions", "/v1/chat/completions"))
    assert set(document["paths"]["/layout"]["post"]["responses"]) >= {"401", "403", "415"}
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_the_schema_knows_media_types_and_limits() -> None:
    document = document_of(ServerOptions())
    answers = {path: operations.popitem()[1]["responses"]["200"] for path, operations in document["paths"].items()}
    assert set(answers["/v1/completions"]["content"]) == {"application/json", "text/event-stream"}
    assert set(answers["/metrics"]["content"]) == {"text/plain"}
    assert "content" not in answers["/health"]
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 100}
    assert fields["stop"]["anyOf"][1]["maxItems"] == 64
    token_id = {"type": "integer", "minimum": 0, "maximum": ScriptedEngine().vocab_size - 1}
    assert fields["prompt"]["anyOf"][1]["items"] == fields["stop_token_ids"]["anyOf"][0]["items"] == token_id
    assert 3 not in fields["tensor_parallel_size"]["anyOf"][0]["enum"]


def test_the_schema_asks_for_the_keys_that_the_server_asks_for() -> None:
    paths = document_of(ServerOptions(api_keys=("key",), admin_key="other"))["paths"]
    assert paths["/v1/completions"]["post"]["security"] == [{"ApiKey": []}]
    assert paths["/layout"]["post"]["security"] == [{"AdminKey": []}, {"AdminKeyHeader": []}]
    assert "security" not in paths["/health"]["get"]
    assert "security" not in document_of(ServerOptions())["paths"]["/v1/completions"]["post"]


def test_a_wrong_method_is_told_all_right_ones(http: httpx.Client) -> None:
    assert http.delete("/layout").headers["allow"] == "GET, HEAD, POST"
    assert http.get("/v1/completions").headers["allow"] == "POST"


def test_tokenize_and_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hé"}).json()
    assert tokens == {"count": 4, "max_model_len": 512, "tokens": [256, 104, 195, 169]}
    bare = http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "hé"}
    empty = http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
    assert (empty["count"], empty["tokens"]) == (0, [])
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
        ("vllm:corrupted_requests_total", ()): 0,
        ("vllm:request_success_total", (("finished_reason", "stop"),)): 1,
        ("vllm:request_success_total", (("finished_reason", "length"),)): 2,
        ("vllm:time_to_first_token_seconds_count", ()): 3,
        ("vllm:inter_token_latency_seconds_count", ()): tokens - 1 + 4 + 4,
        ("vllm:e2e_request_latency_seconds_count", ()): 3,
        ("fly:layout_info", (("layout", "4"),)): 1,
        ("fly:policy_info", (("policy", "static"),)): 1,
        ("fly:num_requests_paused", ()): 2,
        ("fly:switches_total", (("strategy", "migrate"),)): 1,
        ("fly:switches_total", (("strategy", "sequential"),)): 0,
        ("fly:switches_total", (("strategy", "soft_preempt"),)): 0,
        ("fly:switches_total", (("strategy", "hard_preempt"),)): 0,
        ("fly:switch_tokens_recomputed_total", ()): 3,
        ("fly:switch_kv_bytes_moved_total", ()): 4096,
        ("fly:last_switch_drain_seconds", ()): 0.25,
        ("fly:last_switch_precopy_seconds", ()): 0.125,
        ("fly:last_switch_cutover_seconds", ()): 0.01,
        ("fly:last_switch_worst_gap_seconds", ()): 0.5,
        ("fly:last_switch_kv_bytes_moved", ()): 4096,
        ("fly:switch_cutover_seconds_count", ()): 1,
        ("fly:switch_cutover_seconds_sum", ()): 0.01,
        ("fly:switch_cutover_seconds_bucket", (("le", "0.005"),)): 0,
        ("fly:switch_cutover_seconds_bucket", (("le", "0.01"),)): 1,
        ("fly:compiles_after_warmup", ()): 0,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert samples["vllm:time_to_first_token_seconds_sum", ()] <= samples["vllm:e2e_request_latency_seconds_sum", ()]


def scrapes(in_process: Client, engine: ScriptedEngine, *between: Callable[[], object]) -> list[Samples]:
    """A scrape at the start and one after each thing that happens."""

    async def work() -> list[str]:
        async with in_process(engine) as client:
            texts = [(await client.get("/metrics")).text]
            for happen in between:
                happen()
                texts.append((await client.get("/metrics")).text)
            return texts

    return [samples_of(text) for text in asyncio.run(work())]


def test_before_the_first_switch_there_are_counts_and_no_last_one(in_process: Client) -> None:
    [samples] = scrapes(in_process, ScriptedEngine())
    assert samples["fly:policy_info", (("policy", "load_adaptive"),)] == 1
    assert samples["fly:switches_total", (("strategy", "migrate"),)] == 0
    assert samples["fly:switch_cutover_seconds_count", ()] == 0
    assert not [name for name, _ in samples if name.startswith("fly:last_switch")]
    decisions = {labels: value for (name, labels), value in samples.items() if name == "fly:layout_decisions_total"}
    names = ("widen", "narrow", "make_room", "refused", "given_up")
    assert decisions == {(("decision", name),): 0 for name in names}
    ended = {labels: value for (name, labels), value in samples.items() if name == "vllm:request_success_total"}
    assert ended == {(("finished_reason", reason),): 0 for reason in ("stop", "length", "abort", "error")}


def test_each_switch_is_observed_once_however_often_it_is_scraped(in_process: Client) -> None:
    engine = ScriptedEngine()

    def switch() -> None:
        engine.switch_now("2+2")

    def switch_twice() -> None:
        switch()
        switch()

    def wait() -> None:
        pass

    found = scrapes(in_process, engine, switch, wait, switch_twice, wait)
    assert [samples["fly:switch_cutover_seconds_count", ()] for samples in found] == [0, 1, 1, 3, 3]


def test_a_switch_is_observed_when_it_has_settled(in_process: Client) -> None:
    engine = ScriptedEngine()
    engine.switch_now("2+2")
    settled = engine.switch_reports[-1]
    engine.switch_reports[-1] = dataclasses.replace(settled, settled=False)

    def settle() -> None:
        engine.switch_reports[-1] = settled

    found = scrapes(in_process, engine, settle)
    assert [samples["fly:switch_cutover_seconds_count", ()] for samples in found] == [0, 1]


def test_the_worst_gap_of_the_last_switch_may_grow(in_process: Client) -> None:
    engine = ScriptedEngine()
    engine.switch_now("2+2")
    before, after = scrapes(in_process, engine, lambda: engine.outgrow_last_gap(1.75))
    key = ("fly:last_switch_worst_gap_seconds", ())
    assert (before[key], after[key]) == (0.5, 1.75)
    assert after["fly:switch_cutover_seconds_count", ()] == 1


def test_decisions_of_the_policy_are_counted_by_name(in_process: Client) -> None:
    engine = ScriptedEngine()
    engine.decisions = {"widen": 2, "narrow": 1}
    [samples] = scrapes(in_process, engine)
    assert samples["fly:layout_decisions_total", (("decision", "widen"),)] == 2
    assert samples["fly:layout_decisions_total", (("decision", "narrow"),)] == 1
    assert samples["fly:layout_decisions_total", (("decision", "make_room"),)] == 0


def test_applications_count_apart(in_process: Client) -> None:
    async def work() -> str:
        async with in_process() as busy, in_process() as idle:
            await busy.post("/v1/completions", json={"prompt": "hi"})
            return (await idle.get("/metrics")).text

    assert samples_of(asyncio.run(work()))["vllm:time_to_first_token_seconds_count", ()] == 0


class StatsThatEnd(ScriptedEngine):
    """Statistics that may be gone with the engine."""

    def latest_stats(self) -> EngineStats:
        if not self.is_alive:
            raise EngineDeadError("the engine has stopped")
        return super().latest_stats()


def test_statistics_may_be_gone(in_process: Client) -> None:
    engine = StatsThatEnd()

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
