"""Log-probabilities straight from Hugging Face transformers (needs torch and transformers).

The model runs with eager attention and without a KV cache: one forward pass over the whole sequence. It is
loaded anew for every sequence, because a "dynamic" rotary embedding keeps the scaling of the longest sequence
that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load_model(model_dir: Path, *, dtype: str = "float32") -> torch.nn.Module:
    """The model of a folder, on the CPU, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@torch.inference_mode()
def model_logprobs(model: torch.nn.Module, token_ids: Sequence[int]) -> np.ndarray:
    """Log-softmax in float32 after each of n tokens: [n, vocab]."""
    logits = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def live_distribution(model_dir: Path, token_ids: Sequence[int], *, dtype: str = "float32") -> np.ndarray:
    """Log-probabilities of every vocabulary entry after each of n tokens: [n, vocab]."""
    return model_logprobs(load_model(model_dir, dtype=dtype), token_ids)


def next_token_logprobs(distribution: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """The entries of a [n, vocab] distribution that belong to the actual next tokens: [n - 1]."""
    return distribution[np.arange(len(token_ids) - 1), np.asarray(token_ids[1:])]


def live_logprobs(model_dir: Path, token_ids: Sequence[int], *, dtype: str = "float32") -> np.ndarray:
    """Teacher-forced log-probability of each next token: [n - 1]."""
    return next_token_logprobs(live_distribution(model_dir, token_ids, dtype=dtype), token_ids)


def top1_margins(distribution: np.ndarray) -> np.ndarray:
    """Distance in log-probability between the two most likely tokens of each row."""
    second, first = np.partition(distribution, -2, axis=-1)[:, -2:].T
    return first - second


def live_greedy(model_dir: Path, token_ids: Sequence[int], steps: int) -> tuple[list[int], float]:
    """Arg-max continuation without a cache, and the smallest top-1 margin along it."""
    model = load_model(model_dir)
    tokens, margin = list(token_ids), float("inf")
    for _ in range(steps):
        last = model_logprobs(model, tokens)[-1:]
        margin = min(margin, float(top1_margins(last)[0]))
        tokens.append(int(last[0].argmax()))
    return tokens[len(token_ids) :], margin
