"""Small workload files for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.bench.workloads import plan

LIMITS = PlanLimits(max_model_len=1024, num_prompts=None, vocab_size=1472)

ONE_PHASE = "[[phases]]\nrate = 4\n"
ONE_KIND = "[[mix]]\ninput_tokens = [8, 16]\noutput_tokens = [4, 4]\n"
RANDOM = f'kind = "random"\nrequests = 20\n{ONE_PHASE}{ONE_KIND}'


def plan_text(
    folder: Path, text: str, *, dataset: Path | None = None, limits: PlanLimits = LIMITS, seed: int = 0
) -> WorkloadPlan:
    """The plan of a workload file with this text."""
    path = folder / "workload.toml"
    path.write_text(text)
    return plan(str(path), dataset_path=dataset, limits=limits, seed=seed)


def write_azure(folder: Path, rows: Sequence[tuple[str, int, int]]) -> Path:
    """Times of the day, and lengths."""
    path = folder / "azure.csv"
    lines = [f"2023-11-16 {time},{prompt},{output}" for time, prompt, output in rows]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + "\r\n".join(lines))
    return path


def write_burstgpt(folder: Path, rows: Sequence[tuple[float, int, int]]) -> Path:
    """Seconds, and lengths."""
    path = folder / "burstgpt.csv"
    lines = [f"{at},ChatGPT,{prompt},{output},{prompt + output},Conversation log" for at, prompt, output in rows]
    path.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "\n".join(lines) + "\n")
    return path


def write_mooncake(folder: Path, rows: Sequence[tuple[int, int, int, list[int]]]) -> Path:
    """Milliseconds, lengths and hash ids."""
    path = folder / "mooncake.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def write_sharegpt(folder: Path, conversations: Sequence[Sequence[tuple[str, str]]]) -> Path:
    """Turns: who, and what."""
    path = folder / "sharegpt.json"
    values: list[dict[str, Any]] = [
        {"id": str(number), "conversations": [{"from": who, "value": what} for who, what in turns]}
        for number, turns in enumerate(conversations)
    ]
    path.write_text(json.dumps(values))
    return path
