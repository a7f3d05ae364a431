"""Model configurations that stress the prepared layout, and helpers to write and load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from checkpoints.prepare import load_weights
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import ModelSpec, model_spec
from tests.tiny_models import CASES, write_model


def _heads(heads: int, kv_heads: int, hidden: int = 64, **overrides: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    return CASES["llama_biases"] | sizes | {"num_hidden_layers": 1} | overrides


# Every way in which heads, FFN and vocabulary can fail to be divided by max_tp, with biases unless said otherwise.
ORDER_CASES: dict[str, dict[str, Any]] = {
    "mha": _heads(4, 4),
    "gqa": _heads(8, 2),
    "multi_query": _heads(8, 1),
    "multi_query_odd": _heads(7, 1),
    "five_heads": _heads(5, 5),
    "three_kv_heads": _heads(9, 3),
    "six_kv_heads": _heads(6, 6),
    "ratio_three_split_in_two": _heads(12, 4),
    "odd_ffn_and_vocabulary": _heads(4, 2, intermediate_size=90, vocab_size=323),
    "narrow_ffn": _heads(4, 2, intermediate_size=20, vocab_size=261),
    "tied": CASES["llama_vocab_323_tied"],
    "qwen2": CASES["qwen2"],
    "qwen3": CASES["qwen3_attention_bias"],
}

MAX_TPS = (1, 2, 4, 8)


def make(folder: Path, case: dict[str, Any], *, max_tp: int = 4, dtype: str = "float32", **options: Any) -> ModelSpec:
    """Writes a model folder and returns its spec."""
    write_model(folder, case, **options)
    return model_spec(ModelConfig.from_folder(folder), max_tp, np.dtype(dtype))


def load(folder: Path, spec: ModelSpec, **options: Any) -> dict[str, np.ndarray]:
    """``load_weights`` in the dtype of the spec."""
    return load_weights(folder, spec, spec.buffers["embedding"].dtype, **options)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The folder's tensors as the safetensors library reads them."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
