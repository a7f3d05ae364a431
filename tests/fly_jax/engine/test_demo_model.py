"""The bundled model recalls facts from its prompt, so a lost or swapped KV block shows as a wrong answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.demo.text import RecallTask, recall_prompt, story_prompt
from fly_jax import LLM, SamplingParams
from tests.support import wait_until_running

pytestmark = pytest.mark.slow  # its engines

MODEL = Path(__file__).parents[3] / "checkpoints" / "demo" / "model"
LAYOUTS = ("1+1+1+1", "2+2", "4", "2+1+1")
MAX_BYTES = 12 * 10**6
ANSWER = SamplingParams(max_tokens=12, temperature=0.0)
STORY = SamplingParams(max_tokens=120, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, devices=4, dtype="float32", max_num_seqs=8, progress=False) as engine:
        yield engine


def long_tasks(llm: LLM, count: int) -> list[RecallTask]:
    """Unseen recall tasks whose prompts have 700 tokens or more."""
    tasks = [recall_prompt(f"test-{seed}", num_facts=125) for seed in range(count)]
    assert all(700 <= len(llm.tokenizer.encode(task.prompt)) < 1024 for task in tasks)
    return tasks


def test_the_model_is_small_and_its_shape_makes_tp4_real(llm: LLM) -> None:
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= MAX_BYTES
    assert llm.max_model_len >= 1024
    config = llm.model_config
    assert config.num_heads >= 8
    assert config.num_kv_heads >= 4


def test_recall_of_long_prompts_is_right_and_the_same_in_every_layout(llm: LLM) -> None:
    tasks = long_tasks(llm, 100)
    answers = {}
    for layout in LAYOUTS:
        llm.switch(layout)
        outputs = llm.generate([task.prompt for task in tasks], ANSWER)
        answers[layout] = [output.token_ids for output in outputs]
        right = sum(output.text.strip() == task.answer for output, task in zip(outputs, tasks, strict=True))
        assert right >= 95, f"{right} of 100 right at {layout}"
    assert all(answers[layout] == answers[LAYOUTS[0]] for layout in LAYOUTS)


def test_recall_works_through_the_chat_template(llm: LLM) -> None:
    tasks = [recall_prompt(f"chat-{seed}", num_facts=60) for seed in range(40)]
    prompts = [
        llm.tokenizer.encode(llm.tokenizer.apply_chat_template(task.messages), add_special_tokens=False)
        for task in tasks
    ]
    outputs = llm.generate(prompts, ANSWER)
    right = sum(output.text.strip() == task.answer for output, task in zip(outputs, tasks, strict=True))
    assert right >= 38


def test_stories_and_answers_are_identical_across_switches_in_mid_generation(llm: LLM) -> None:
    llm.switch(LAYOUTS[0])
    prompts = [story_prompt(f"switch-{seed}") for seed in range(12)]
    prompts += [task.prompt for task in long_tasks(llm, 6)]
    expected = [output.token_ids for output in llm.generate(prompts, STORY)]
    reports = []

    def switch_around() -> None:
        for layout in ("2+2", "4", "2+1+1", "1+1+1+1"):
            wait_until_running(llm)
            reports.append(llm.switch(layout))

    switcher = threading.Thread(target=switch_around)
    switcher.start()
    rounds = []
    while switcher.is_alive():
        rounds.append(llm.generate(prompts, STORY))
    for outputs in rounds:
        assert [output.token_ids for output in outputs] == expected
    assert max(report.requests_moved for report in reports) > 0
    assert all(report.tokens_recomputed == 0 for report in reports)


def test_a_story_is_told_to_its_end(llm: LLM) -> None:
    (output,) = llm.generate(story_prompt("end"), SamplingParams(max_tokens=300, temperature=0.0))
    assert output.finish_reason == "stop"
    assert output.text.count(".") >= 4
