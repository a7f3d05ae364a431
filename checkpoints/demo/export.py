"""Writes a model folder in Hugging Face format, with the weights rounded to bfloat16."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from checkpoints.demo.plain_llama import LlamaConfig, Weights
from checkpoints.demo.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS


def write_model(model_dir: Path, config: LlamaConfig, weights: Weights) -> None:
    """Writes config.json, generation_config.json and model.safetensors."""
    model_dir.mkdir(parents=True, exist_ok=True)
    ids = {
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    _write_json(
        model_dir / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            **asdict(config),
            **ids,
        },
    )
    _write_json(model_dir / "generation_config.json", {"do_sample": False, **ids})
    rounded = {name: np.asarray(weight.astype(jnp.bfloat16)) for name, weight in weights.items()}
    path = model_dir / "model.safetensors"
    save_file(rounded, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file makes it readable by its owner only


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
