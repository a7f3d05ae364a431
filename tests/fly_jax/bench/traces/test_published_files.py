"""A few rows in the exact form of each published file, byte for byte, planned as ``serve`` plans them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fly_jax.bench.__main__ import parse
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.serve_plan import plan
from fly_jax.bench.serve_run import check
from fly_jax.bench.served_model import ServedModel

# Lines end like Windows lines, but for the last, which does not end; seven decimals and no time zone.
AZURE_2023 = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:17:03.9799600,48,10\r\n"
    b"2023-11-16 18:17:13.9799600,318,8\r\n"
    b"2023-11-16 18:17:14.2299601,110,27\r\n"
    b"2023-11-16 18:17:33.9799590,743,14\r\n"
    b"2023-11-16 18:17:33.9799600,34,12"
)
# Six decimals or none, and a time zone.
AZURE_2024 = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
    b"2024-05-10 00:00:00.009930+00:00,216,5\n"
    b"2024-05-10 00:00:11+00:00,239,6\n"
    b"2024-05-10 00:00:12.509930+00:00,76,15\n"
    b"2024-05-10 00:00:30.009930+00:00,221,84\n"
)
# Whole seconds; requests that failed have no response.
BURSTGPT_1 = (
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"5,ChatGPT,472,18,490,Conversation log\n"
    b"15,ChatGPT,108,230,338,Conversation log\n"
    b"17,GPT-4,417,276,693,API log\n"
    b"20,ChatGPT,300,0,300,Conversation log\n"
    b"35,GPT-4,135,60,195,Conversation log\n"
)
# Seconds with a point that begin anywhere, two more columns, some of which are empty.
BURSTGPT_3 = (
    b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"19440110.0,1722ac82-0000-4bf0-aa08-000000000000,43,GPT-4,906,44,950,Conversation log\n"
    b"19440120.0,d5983bf9-0000-497b-892b-000000000000,2,ChatGPT,36,29,65,Conversation log\n"
    b"19440122.0,,,ChatGPT,52,7,59,API log\n"
    b"19440140.0,a5c69b35-0000-45e9-0000-000000000000,9,GPT-4,80,70,150,Conversation log\n"
)
MOONCAKE = (
    b'{"timestamp": 0, "input_length": 675, "output_length": 50, "hash_ids": [0, 1]}\n'
    b'{"timestamp": 10000, "input_length": 732, "output_length": 49, "hash_ids": [0, 14]}\n'
    b'{"timestamp": 12000, "input_length": 723, "output_length": 79, "hash_ids": [0, 28]}\n'
    b'{"timestamp": 30000, "input_length": 157, "output_length": 57, "hash_ids": [46]}\n'
)
SHAREGPT = b"""[{"id": "QWJhYvA_0", "conversations": [
 {"from": "human", "value": "Summarize the main ideas of this text.\\n\\u201cOne\\u201d"},
 {"from": "gpt", "value": "Here are the main ideas:\\n\\n1. One."},
 {"from": "human", "value": "Summarize again"}, {"from": "gpt", "value": "One."}]},
 {"id": "QWJhYvA_17", "conversations": [{"from": "gpt", "value": "an answer that was cut from its question"}]},
 {"id": "i6IyJda_0", "conversations": []}]"""


def planned(folder: Path, kind: str, data: bytes, keys: str, *given: str) -> list[PlannedRequest]:
    """What ``serve`` sends for a workload of this kind with these keys, both files given by their paths."""
    (folder / "mine.toml").write_text(f'kind = "{kind}"\n{keys}')
    (folder / "data").write_bytes(data)
    paths = ("--workload", str(folder / "mine.toml"), "--dataset-path", str(folder / "data"))
    options = parse(["serve", *paths, *given])
    return list(plan(options, check(options), ServedModel("m", 1024)).requests)


def times_and_lengths(requests: list[PlannedRequest]) -> list[tuple[float, int, int]]:
    return [(round(each.at, 4), each.prompt_tokens, each.max_tokens) for each in requests]


WINDOW = "window_start = 10\nwindow_seconds = 20\nrate_scale = 4\n"


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        # Its fourth row is the last microsecond of the window, its fifth the first moment after it.
        ("azure", AZURE_2023, [(0.0, 318, 8), (0.0625, 110, 27), (5.0, 743, 14)]),
        ("azure", AZURE_2024, [(0.2475, 239, 6), (0.625, 76, 15)]),
        ("burstgpt", BURSTGPT_1, [(0.0, 108, 230), (0.5, 417, 276)]),
        ("burstgpt", BURSTGPT_3, [(0.0, 36, 29), (0.5, 52, 7)]),
        ("mooncake", MOONCAKE, [(0.0, 732, 49), (0.5, 723, 79)]),
    ],
    ids=["azure-2023", "azure-2024", "burstgpt-1", "burstgpt-3", "mooncake"],
)
def test_a_window_of_a_published_trace_is_replayed_faster(
    kind: str, data: bytes, expected: list[tuple[float, int, int]], tmp_path: Path
) -> None:
    requests = planned(tmp_path, kind, data, WINDOW)
    assert times_and_lengths(requests) == expected
    assert [len(each.prompt) for each in requests] == [each.prompt_tokens for each in requests]
    assert requests[:1] == planned(tmp_path, kind, data, WINDOW, "--num-prompts", "1")


@pytest.mark.parametrize(
    ("kind", "data", "count"),
    [
        ("azure", AZURE_2023, 5), ("azure", AZURE_2024, 4), ("burstgpt", BURSTGPT_1, 4), ("burstgpt", BURSTGPT_3, 4),
        ("mooncake", MOONCAKE, 4),
    ],
)  # fmt: skip
def test_without_a_window_every_request_that_was_answered_is_replayed_in_real_time(
    kind: str, data: bytes, count: int, tmp_path: Path
) -> None:
    requests = planned(tmp_path, kind, data, "")
    assert len(requests) == count
    assert requests[0].at == 0
    assert requests[-1].at == pytest.approx(30)


def test_mooncakes_shared_blocks_are_the_same_tokens(tmp_path: Path) -> None:
    first, second, third, other = (each.prompt for each in planned(tmp_path, "mooncake", MOONCAKE, ""))
    assert first[:512] == second[:512] == third[:512]
    assert first[512:] != second[512:675]
    assert other[:100] != first[:100]


def test_the_first_question_of_a_sharegpt_conversation_is_asked_and_ones_without_are_left_out(tmp_path: Path) -> None:
    keys = "requests = 9\n[[phases]]\nrate = 1000\n"
    [request] = planned(tmp_path, "sharegpt", SHAREGPT, keys)
    question, answer = (turn["value"] for turn in json.loads(SHAREGPT)[0]["conversations"][:2])
    assert request.prompt == question == "Summarize the main ideas of this text.\n“One”"
    assert (request.prompt_tokens, request.max_tokens) == (len(question) // 4, len(answer) // 4)
