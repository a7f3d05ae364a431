"""Reference log-probabilities of the models in ``tests.tiny_models`` from Hugging Face transformers.

``golden.json`` is written by ``tests.golden.make_golden``; reading it needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import CASES, fingerprint

GOLDEN_PATH = Path(__file__).with_name("golden.json")


class StaleGoldenError(RuntimeError):
    """The stored values were computed for another config or other weights."""


@dataclass(frozen=True)
class GoldenPrompt:
    """Reference values of one prompt of n tokens, from a single forward pass over the whole prompt.

    ``logprobs[i]`` is the log-probability of ``token_ids[i + 1]`` after ``token_ids[: i + 1]``: n - 1 values.
    ``top1[i]`` is the most likely token after ``token_ids[: i + 1]`` and ``top1_margins[i]`` its distance in
    log-probability to the second most likely one: n values each. ``rope_length`` is the sequence length that a
    length-dependent rotary scaling ("dynamic") saw at every position: n.
    """

    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    top1: np.ndarray
    top1_margins: np.ndarray
    rope_length: int


@dataclass(frozen=True)
class Golden:
    """Reference values of one case.

    ``greedy`` continues the first prompt by arg-max (end-of-sequence ids do not stop it); ``greedy_margin``
    is the smallest top-1 to top-2 distance along it.
    """

    case: str
    prompts: tuple[GoldenPrompt, ...]
    greedy: tuple[int, ...]
    greedy_margin: float
    transformers_version: str
    torch_version: str


@cache
def _document() -> dict[str, Any]:
    return json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))


def _prompt(entry: dict[str, Any]) -> GoldenPrompt:
    return GoldenPrompt(
        token_ids=tuple(entry["token_ids"]),
        logprobs=np.asarray(entry["logprobs"], dtype=np.float32),
        top1=np.asarray(entry["top1"], dtype=np.int32),
        top1_margins=np.asarray(entry["top1_margins"], dtype=np.float32),
        rope_length=entry["rope_length"],
    )


def golden_cases() -> list[str]:
    """Names of the stored cases."""
    return list(_document()["cases"])


def load_golden(case: str) -> Golden:
    """The stored values of a case; raises ``StaleGoldenError`` if the case has changed since."""
    document = _document()
    entry = document["cases"].get(case)
    if entry is None or entry["fingerprint"] != fingerprint(CASES[case]):
        state = "missing" if entry is None else "stale"
        raise StaleGoldenError(f"golden values of {case!r} are {state}: run tests.golden.make_golden")
    return Golden(
        case=case,
        prompts=tuple(_prompt(prompt) for prompt in entry["prompts"]),
        greedy=tuple(entry["greedy"]),
        greedy_margin=entry["greedy_margin"],
        transformers_version=document["transformers"],
        torch_version=document["torch"],
    )
