"""Small values that several test modules build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fly_jax.kv.blocks import KVCacheManager, KVCacheSpec
from fly_jax.layout import DeviceGroup
from fly_jax.logprobs import PromptLogprobs
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request
from fly_jax.text.tokenizer import Tokenizer
from tests.tiny_models import CASES, tokenizer_config, tokenizer_json


def make_request(
    prompt: int | Sequence[int] = 4,
    *,
    name: str = "r",
    max_tokens: int = 8,
    seed: int = 0,
    min_width: int = 1,
    priority: int = 0,
    order: int = 0,
    client: str | None = None,
    **params: Any,
) -> Request:
    """A request of these prompt tokens, or of this many."""
    return Request(
        name,
        tuple(range(1, prompt + 1)) if isinstance(prompt, int) else tuple(prompt),
        SamplingParams(max_tokens=max_tokens, **params),
        max_tokens,
        seed,
        arrival=0.0,
        min_width=min_width,
        priority=priority,
        order=order,
        client=client,
    )


def own_logprobs(token_ids: Sequence[int], logprobs: Sequence[float]) -> PromptLogprobs:
    """Of prompt tokens whose alternatives nobody asked for; each has rank 1."""
    ids, values = np.asarray(token_ids, np.int32), np.asarray(logprobs, np.float32)
    return PromptLogprobs(ids, values, np.ones_like(ids), ids[:, None][:, :0], values[:, None][:, :0])


def nothing_to_reclaim(group: DeviceGroup) -> bool:  # noqa: ARG001  the shape of a scheduler's callback
    """No blocks are taken ahead."""
    return False


def make_kv(
    num_blocks: int = 64, *, block_size: int = 4, kv_heads: int = 4, num_devices: int = 1, base_tp: int = 1
) -> KVCacheManager:
    spec = KVCacheSpec(num_blocks, block_size, num_layers=1, kv_heads=kv_heads, head_dim=16, bytes_per_element=2)
    return KVCacheManager(spec, num_devices, base_tp)


def make_tokenizer(folder: Path, **options: Any) -> Tokenizer:
    """A byte-level tokenizer whose ids 0 to 255 are bytes; ``options`` go into its ``tokenizer_config.json``."""
    config = CASES["llama_mha"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(config)), encoding="utf-8")
    options = {name: value for name, value in (tokenizer_config(config) | options).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    return Tokenizer.of_folder(folder)
