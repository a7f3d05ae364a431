"""A plain Llama: one dense causal forward pass over weights under their Hugging Face names.

There is no cache, no batching trick and no sharding here. Training uses it, and because it shares
no code with the engine, tests can hold the engine's logits against it.

Shapes: B sequences, T tokens each, D hidden size, H query heads, K key/value heads, N head size,
V vocabulary. Linear weights are [out, in] as Hugging Face stores them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from safetensors.numpy import load_file

Weights = Mapping[str, Array]


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> LlamaConfig:
        """Takes the known fields of a config.json and ignores the others."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def load_model(model_dir: Path) -> tuple[LlamaConfig, dict[str, Array]]:
    """Reads config.json and model.safetensors; weights keep the type that they are stored in."""
    config = LlamaConfig.from_dict(json.loads((model_dir / "config.json").read_text()))
    weights = {name: jnp.asarray(value) for name, value in load_file(model_dir / "model.safetensors").items()}
    return config, weights


def forward(weights: Weights, config: LlamaConfig, tokens: Array) -> Array:
    """Logits [B, T, V] in float32 for tokens [B, T]; the weights' type is the type of computation."""
    return logits(weights, config, hidden_states(weights, config, tokens))


def hidden_states(weights: Weights, config: LlamaConfig, tokens: Array) -> Array:
    """The final-norm output [B, T, D] for tokens [B, T]."""
    x = weights["model.embed_tokens.weight"][tokens]
    cos, sin = rope_tables(config, tokens.shape[1])
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(weights, prefix + "self_attn.", config, normed, cos, sin)
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mlp(weights, prefix + "mlp.", normed)
    return rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)


def logits(weights: Weights, config: LlamaConfig, hidden: Array) -> Array:
    """Logits [..., V] in float32 of final hidden states [..., D]."""
    tied = config.tie_word_embeddings
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x [..., D] over its root mean square, times scale [D]; the mean is taken in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale


def rope_tables(config: LlamaConfig, length: int) -> tuple[Array, Array]:
    """Cosines and sines [T, N/2] in float32 of positions 0 to length - 1."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * config.rope_theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [B, heads, T, N]: component i turns with component i + N/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(weights: Weights, prefix: str, config: LlamaConfig, x: Array, cos: Array, sin: Array) -> Array:
    """Causal grouped-query self-attention of x [B, T, D]; the result is [B, T, D].

    Query head h reads key/value head h // (H / K). Scores and softmax are float32.
    """
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> Array:
        projected = x @ weights[f"{prefix}{name}.weight"].T
        return projected.reshape(batch, length, count, config.head_dim).swapaxes(1, 2)

    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    q = rotate(heads("q_proj", config.num_attention_heads), cos, sin)
    q = q.reshape(batch, kv_heads, group, length, config.head_dim)
    k = rotate(heads("k_proj", kv_heads), cos, sin)
    v = heads("v_proj", kv_heads)
    scores = jnp.einsum("bkgtn,bksn->bkgts", q, k, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(causal, scores / math.sqrt(config.head_dim), -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bkgts,bksn->btkgn", probabilities, v).reshape(batch, length, -1)
    return mixed @ weights[prefix + "o_proj.weight"].T


def mlp(weights: Weights, prefix: str, x: Array) -> Array:
    """The SiLU-gated feed-forward layer of x [B, T, D]."""
    gate = jax.nn.silu(x @ weights[prefix + "gate_proj.weight"].T)
    return (gate * (x @ weights[prefix + "up_proj.weight"].T)) @ weights[prefix + "down_proj.weight"].T
