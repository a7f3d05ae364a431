"""Compute ``golden.json`` with Hugging Face transformers (needs torch and transformers).

``python -m tests.golden.make_golden`` rewrites the file; with ``--check`` it compares the stored values with
freshly computed ones and fails on a difference.

For "dynamic" rotary scaling the values follow the single forward pass: the frequencies of all positions, also
of the early ones, come from the total length n of the prompt (``rope_length``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.golden import GOLDEN_PATH, load_golden
from tests.golden.parity import live_distribution, live_greedy, next_token_logprobs, top1_margins
from tests.tiny_models import CASES, Config, fingerprint, random_token_ids, write_model

PROMPT_LENGTHS = (40, 100)
LONG_PROMPT_LENGTHS = {"llama_rope_yarn_long": 560}
GREEDY_STEPS = 12
GREEDY_MARGIN = 0.02
"""Prompts are redrawn until arg-max decoding has this margin, so that rounding does not change its tokens."""
GREEDY_DISTINCT = 3
"""Prompts are redrawn until the continuation has this many different tokens."""
CHECK_TOLERANCE = 1e-4


def _floats(values: np.ndarray) -> list[float]:
    """The shortest decimals that parse back to the same float32 values."""
    return [float(str(value)) for value in values.astype(np.float32)]


def prompt_entry(model_dir: Path, token_ids: list[int]) -> dict[str, Any]:
    """The stored values of one prompt."""
    distribution = live_distribution(model_dir, token_ids)
    return {
        "token_ids": token_ids,
        "rope_length": len(token_ids),
        "logprobs": _floats(next_token_logprobs(distribution, token_ids)),
        "top1": distribution.argmax(axis=-1).tolist(),
        "top1_margins": _floats(top1_margins(distribution)),
    }


def _first_prompt(model_dir: Path, config: Config, seed: int) -> tuple[list[int], list[int], float]:
    """The first random prompt with a suitable greedy continuation, that continuation and its margin."""
    for attempt in range(200):
        token_ids = random_token_ids(PROMPT_LENGTHS[0], config["vocab_size"], seed=seed + attempt)
        greedy, margin = live_greedy(model_dir, token_ids, GREEDY_STEPS)
        if margin >= GREEDY_MARGIN and len(set(greedy)) >= GREEDY_DISTINCT:
            return token_ids, greedy, margin
    raise RuntimeError("no prompt has a suitable greedy continuation")


def case_entry(case: str, config: Config) -> dict[str, Any]:
    """The stored values of one case."""
    seed = zlib.crc32(case.encode()) << 32
    second = random_token_ids(LONG_PROMPT_LENGTHS.get(case, PROMPT_LENGTHS[1]), config["vocab_size"], seed=seed + 2**16)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder)
        write_model(model_dir, config)
        first, greedy, margin = _first_prompt(model_dir, config, seed)
        prompts = [prompt_entry(model_dir, token_ids) for token_ids in (first, second)]
    return {
        "fingerprint": fingerprint(config),
        "greedy": greedy,
        "greedy_margin": float(str(np.float32(margin))),
        "prompts": prompts,
    }


def write_golden(path: Path) -> None:
    """Compute all cases and write them, one array per line."""
    entries = {case: case_entry(case, config) for case, config in CASES.items()}
    document = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": entries}
    path.write_text(_dumps(document) + "\n", encoding="utf-8")


def _dumps(value: Any, indent: str = "") -> str:
    """JSON with nested objects indented and arrays of numbers on a single line."""
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {_dumps(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + _dumps(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, separators=(",", ":"))


def check_case(case: str) -> float:
    """Largest difference between stored and fresh log-probabilities of a case."""
    golden = load_golden(case)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), CASES[case])
        fresh = [prompt_entry(Path(folder), list(prompt.token_ids)) for prompt in golden.prompts]
        greedy, _ = live_greedy(Path(folder), golden.prompts[0].token_ids, len(golden.greedy))
    if tuple(greedy) != golden.greedy:
        return float("inf")
    pairs = zip(fresh, golden.prompts, strict=True)
    return max(float(np.abs(np.float32(new["logprobs"]) - old.logprobs).max()) for new, old in pairs)


def main() -> int:
    """Write or check the golden file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compute golden.json with Hugging Face transformers.")
    parser.add_argument("--check", action="store_true", help="compare with the stored values, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if not arguments.check:
        write_golden(GOLDEN_PATH)
        return 0
    differences = {case: check_case(case) for case in CASES}
    for case, difference in differences.items():
        print(f"{case:36} {difference:.2e}")
    return int(max(differences.values()) > CHECK_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
