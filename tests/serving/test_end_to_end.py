"""The official client against the real engine over a real socket, while the layout changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fly_jax import AsyncEngine
from fly_jax.outputs import EngineStats, SwitchStrategy
from tests.serving.live import LiveServer, eventually, live_server
from tests.support import small_config
from tests.tiny_models import CASES, write_model

pytestmark = pytest.mark.slow  # its engines

LAYOUTS = ("1+1+1+1", "2+2", "4")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_model(folder, {**CASES["llama_gqa_tied"], "max_position_embeddings": 512})
    engine = AsyncEngine.from_config(small_config(folder, layouts=LAYOUTS, policy="static", max_num_queued_reqs=64))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine: AsyncEngine) -> Iterator[LiveServer]:
    with live_server(engine) as server:
        yield server


def complete(server: LiveServer, prompt: str, **options: object) -> str:
    model = server.openai.models.list().data[0].id
    arguments = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}, **options}
    return server.openai.completions.create(model=model, prompt=prompt, **arguments).choices[0].text


def stats_are_idle(stats: EngineStats) -> bool:
    return stats.running == stats.waiting == 0 and stats.free_blocks == (stats.num_blocks,) * 4


@pytest.mark.parametrize("strategy", list(SwitchStrategy))
def test_completions_are_the_same_in_every_layout_and_while_it_changes(
    server: LiveServer, strategy: SwitchStrategy
) -> None:
    prompts = [f"prompt {index} " * (index + 1) for index in range(8)]
    expected = [complete(server, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for layout in (*LAYOUTS[1:], LAYOUTS[0]):
            answers = [pool.submit(complete, server, prompt) for prompt in prompts]
            body = {"layout": layout, "strategy": strategy}
            report = server.http.post("/layout", json=body).raise_for_status().json()
            assert (report["target"], report["strategy"], report["policy"]) == (layout, strategy, "static")
            assert [answer.result() for answer in answers] == expected
    assert server.http.get("/layout").json()["layout"] == LAYOUTS[0]


def test_the_layout_is_handed_to_the_policy_and_taken_back(server: LiveServer, engine: AsyncEngine) -> None:
    before = complete(server, "hand over")
    given = server.http.post("/layout", json={"policy": "auto"}).raise_for_status().json()
    assert given["policy"] == server.http.get("/layout").json()["policy"] == "load_adaptive"
    assert complete(server, "hand over") == before
    taken = server.http.post("/layout", json={"layout": LAYOUTS[0], "policy": "static"}).raise_for_status().json()
    assert (taken["target"], taken["policy"], engine.layout) == (LAYOUTS[0], "static", LAYOUTS[0])


def test_a_width_that_no_group_has_is_refused_by_name(server: LiveServer) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "wide", "tensor_parallel_size": 8})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tensor_parallel_size")


def test_no_client_goes_before_others_unless_the_server_runs_by_priority(server: LiveServer) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "me first", "priority": -1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    assert "--scheduling-policy priority" in answer.json()["error"]["message"]
    assert server.http.post("/v1/completions", json={"prompt": "in turn", "priority": 0}).status_code == 200


def test_a_stream_adds_up_to_the_whole_answer(server: LiveServer) -> None:
    model = server.openai.models.list().data[0].id
    whole = server.openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "héllo ✓"}], max_tokens=24, temperature=0.8, seed=5
    )
    stream = server.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "héllo ✓"}],
        max_tokens=24,
        temperature=0.8,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_client_that_leaves_frees_its_blocks(server: LiveServer, engine: AsyncEngine) -> None:
    model = server.openai.models.list().data[0].id
    with server.openai.completions.create(
        model=model, prompt="x", max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        assert not stats_are_idle(engine.stats_now())
    assert eventually(lambda: stats_are_idle(engine.stats_now()))
    assert engine.stats_now().requests_finished["abort"] >= 1


def test_metrics_report_the_engine(server: LiveServer) -> None:
    complete(server, "count me")
    text = server.http.get("/metrics").text
    assert "vllm:generation_tokens_total" in text
    assert re.search(r'fly:layout_info\{.*layout="1\+1\+1\+1".*\} 1\.0', text)
    assert re.search(r"fly:compiles_after_warmup\S* 0\.0", text)


def test_a_prompt_beyond_the_context_is_a_400_with_both_numbers(server: LiveServer) -> None:
    model = server.openai.models.list().data[0].id
    answer = server.http.post("/v1/completions", json={"model": model, "prompt": [7] * 600})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "600" in message
    assert "512" in message


def test_a_model_folder_has_a_name(engine: AsyncEngine) -> None:
    assert engine.model_name.startswith("tiny-llama")
    assert Path(engine.model_name).name == engine.model_name
