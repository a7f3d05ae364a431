"""Conversations as text prompts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.workload_builders import LIMITS, ONE_PHASE, plan_text, write_sharegpt

CONVERSATIONS = [[("human", f"{number}" * (40 + number)), ("gpt", "y" * 80)] for number in range(9)]


def _plan(folder: Path, options: str = "", conversations: Any = CONVERSATIONS, **more: Any) -> WorkloadPlan:
    dataset = write_sharegpt(folder, conversations)
    return plan_text(folder, f'kind = "sharegpt"\nrequests = 50\n{options}\n{ONE_PHASE}', dataset=dataset, **more)


def test_each_conversation_is_asked_once_in_an_order_that_the_seed_gives(tmp_path: Path) -> None:
    requests = _plan(tmp_path, seed=1).requests
    prompts = [each.prompt for each in requests]
    assert sorted(map(str, prompts)) == sorted(turns[0][1] for turns in CONVERSATIONS)
    assert prompts == [each.prompt for each in _plan(tmp_path, seed=1).requests]
    assert prompts != [each.prompt for each in _plan(tmp_path, seed=2).requests]
    for each in requests:
        assert (each.prompt_tokens, each.max_tokens) == (len(each.prompt) // 4, 20)


def test_fewer_requests_are_the_first_of_more(tmp_path: Path) -> None:
    few = _plan(tmp_path, limits=replace(LIMITS, num_prompts=4)).requests
    assert few == _plan(tmp_path).requests[:4]


def test_the_first_answer_to_a_human_counts_and_conversations_without_one_are_skipped(tmp_path: Path) -> None:
    conversations = [
        [("system", "be nice"), ("gpt", "hello"), ("human", "x" * 8), ("gpt", "y" * 12), ("human", "z"), ("gpt", "z")],
        [("human", "nobody answers")],
        [("human", ""), ("gpt", "an answer to nothing")],
        [],
    ]
    planned = _plan(tmp_path, conversations=conversations)
    assert [(each.prompt, each.prompt_tokens, each.max_tokens) for each in planned.requests] == [("x" * 8, 2, 3)]
    assert planned.skipped == 3


def test_short_texts_have_at_least_one_token_and_stay_whole(tmp_path: Path) -> None:
    (request,) = _plan(tmp_path, conversations=[[("human", "hi?"), ("gpt", "yes")]]).requests
    assert (request.prompt, request.prompt_tokens, request.max_tokens) == ("hi?", 1, 1)


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    conversations = [[("human", "x" * 8001), ("gpt", "y" * 400)], [("human", "x" * 401), ("gpt", "y" * 400)]]
    planned = _plan(tmp_path, conversations=conversations)
    assert sorted((len(each.prompt), each.prompt_tokens, each.max_tokens) for each in planned.requests) == [
        (401, 100, 100),
        (924 * 4, 924, 100),
    ]
    assert planned.clipped == 1


def test_scales_and_characters_per_token_change_the_lengths(tmp_path: Path) -> None:
    conversations = [[("human", "x" * 80), ("gpt", "y" * 40)]]
    (request,) = _plan(tmp_path, "input_scale = 0.5\noutput_scale = 3", conversations).requests
    assert (request.prompt, request.prompt_tokens, request.max_tokens) == ("x" * 40, 10, 30)
    (request,) = _plan(tmp_path, "characters_per_token = 2", conversations).requests
    assert (request.prompt, request.prompt_tokens, request.max_tokens) == ("x" * 80, 40, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("input_scale = 2", "input_scale must be a number above 0 and at most 1, got 2"),
        ("output_scale = 0", "output_scale must be a number above 0, got 0"),
        ("characters_per_token = 0", "characters_per_token must be an integer of at least 1, got 0"),
        ("characters_per_token = 2.5", "characters_per_token must be an integer of at least 1, got 2.5"),
        ("rate_scale = 2", "unknown key rate_scale (= 2); known ones are burstiness, characters_per_token, "),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        _plan(tmp_path, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: "),
        ("{}", "must be a list of conversations, got dict"),
        ("[1]", "must be a list of conversations"),
        ("[]", "has no conversation in which a gpt answers a human, of 0"),
        ('[{"conversations": []}, {"items": []}]', 'conversation 2: "conversations" must be a list of {"from": text'),
        (json.dumps([{"conversations": [{"from": "human", "value": 3}]}]), "conversation 1: "),
    ],
)
def test_what_is_not_of_the_format_is_refused(tmp_path: Path, content: str, message: str) -> None:
    dataset = tmp_path / "chats.json"
    dataset.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        plan_text(tmp_path, f'kind = "sharegpt"\nrequests = 5\n{ONE_PHASE}', dataset=dataset)
    assert str(dataset) in str(refused.value)
