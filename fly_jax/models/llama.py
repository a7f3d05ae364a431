"""The Llama family (Llama 2/3/3.1, Mistral, Qwen2, Qwen3) over flat token batches.

Source: transformers ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM``.

A module runs on whatever shard of its parameters it is given: inside a TP group the sharded axes are shorter,
and ``reduce`` sums the two row-parallel products of a layer over the group. Each parameter names its logical
axes; ``fly_jax.models.sharding`` maps them to the mesh. Row orders (see ``checkpoints.prepare``):

- ``qkv``: unit by unit, ``queries_per_unit`` query heads, the key head, the value head;
- ``gate_up``: ``max_tp`` chunk pairs ``gate_0, up_0, gate_1, up_1, ...``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fly_jax.models.config import ModelConfig
from fly_jax.models.partition import Partition
from fly_jax.models.rope import apply_rope, rope_tables

Reduce = Callable[[Array], Array]


class Attend(Protocol):
    """Writes a layer's keys and values and attends over everything written so far."""

    def __call__(self, layer: int, query: Array, key: Array, value: Array) -> Array:
        """``query [tokens, kv_heads, group, head_dim]``, ``key``/``value [tokens, kv_heads, head_dim]`` -> as query."""


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter that is only a shape: weights are views of resident buffers and are merged in per step."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), logical_axes=axes)


def linear(x: Array, weight: Array) -> Array:
    """``x [..., in] @ weight[out, in].T`` in float32.

    XLA on CPU runs bf16 natively only with a float32 result; a bf16 one converts the whole weight at each step.
    """
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm over the last axis, computed in float32 and returned in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * wide.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


def row_parallel(x: Array, weight: Array) -> Array:
    """``x [..., in] @ weight [in, out]``, summed in float32 and returned in x's dtype."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, part: Partition, dtype: jnp.dtype) -> None:
        head, hidden = part.head_dim, config.hidden_size
        qkv_rows = part.units * (part.queries_per_unit + 2) * head
        self.qkv = parameter((qkv_rows, hidden), ("qkv", "embed"), dtype)
        self.output = parameter((part.units * part.queries_per_unit * head, hidden), ("heads", "embed"), dtype)
        # Vectors are float32: a bf16 shard of one narrow head would start off a 64-byte boundary and be copied.
        self.qkv_bias = parameter((qkv_rows,), ("qkv",), jnp.float32) if config.qkv_bias else None
        self.output_bias = parameter((hidden,), ("embed",), jnp.float32) if config.output_bias else None
        self.query_norm = parameter((head,), ("head_dim",), dtype) if config.qk_norm else None
        self.key_norm = parameter((head,), ("head_dim",), dtype) if config.qk_norm else None
        self.part, self.eps = part, config.rms_norm_eps

    def __call__(self, layer: int, x: Array, rope: tuple[Array, Array], attend: Attend, reduce: Reduce) -> Array:
        """``x [tokens, embed]`` -> ``[tokens, embed]``."""
        part, tokens = self.part, x.shape[0]
        fused = linear(x, self.qkv[...])
        if self.qkv_bias is not None:
            fused = fused + self.qkv_bias[...]
        fused = fused.astype(x.dtype).reshape(tokens, -1, part.queries_per_unit + 2, part.head_dim)
        units = fused.shape[1]
        copies = min(part.kv_copies, units)
        query = fused[:, :, :-2].reshape(tokens, -1, part.head_dim)
        key, value = fused[:, ::copies, -2], fused[:, ::copies, -1]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = rms_norm(query, self.query_norm[...], self.eps), rms_norm(key, self.key_norm[...], self.eps)
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        query = query.reshape(tokens, units // copies, -1, part.head_dim)
        mixed = attend(layer, query, key, value).reshape(tokens, -1)
        out = reduce(row_parallel(mixed, self.output[...]))
        return out if self.output_bias is None else (out + self.output_bias[...]).astype(x.dtype)


class MLP(nnx.Module):
    """SiLU-gated feed-forward network."""

    def __init__(self, config: ModelConfig, part: Partition, dtype: jnp.dtype) -> None:
        hidden = config.hidden_size
        self.gate_up = parameter((2 * part.ffn, hidden), ("gate_up", "embed"), dtype)
        self.down = parameter((part.ffn, hidden), ("ffn", "embed"), dtype)
        self.gate_up_bias = parameter((2 * part.ffn,), ("gate_up",), jnp.float32) if config.mlp_bias else None
        self.down_bias = parameter((hidden,), ("embed",), jnp.float32) if config.mlp_bias else None
        self.chunk = part.ffn_chunk

    def __call__(self, x: Array, reduce: Reduce) -> Array:
        """``x [tokens, embed]`` -> ``[tokens, embed]``."""
        fused = linear(x, self.gate_up[...])
        if self.gate_up_bias is not None:
            fused = fused + self.gate_up_bias[...]
        fused = fused.reshape(x.shape[0], -1, 2, self.chunk)
        gated = (jax.nn.silu(fused[:, :, 0]) * fused[:, :, 1]).astype(x.dtype).reshape(x.shape[0], -1)
        out = reduce(row_parallel(gated, self.down[...]))
        return out if self.down_bias is None else (out + self.down_bias[...]).astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ModelConfig, part: Partition, dtype: jnp.dtype) -> None:
        self.attention_norm = parameter((config.hidden_size,), ("embed",), dtype)
        self.attention = Attention(config, part, dtype)
        self.mlp_norm = parameter((config.hidden_size,), ("embed",), dtype)
        self.mlp = MLP(config, part, dtype)
        self.eps = config.rms_norm_eps

    def __call__(self, layer: int, x: Array, rope: tuple[Array, Array], attend: Attend, reduce: Reduce) -> Array:
        x = x + self.attention(layer, rms_norm(x, self.attention_norm[...], self.eps), rope, attend, reduce)
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps), reduce)


class Decoder(nnx.Module):
    """Embedding, layers, final norm: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, part: Partition, dtype: jnp.dtype) -> None:
        self.embedding = parameter((part.vocab, config.hidden_size), ("vocab_table", "embed"), dtype)
        self.layers = nnx.List([DecoderLayer(config, part, dtype) for _ in range(config.num_layers)])
        self.final_norm = parameter((config.hidden_size,), ("embed",), dtype)
        self.config = config

    def __call__(
        self, tokens: Array, positions: Array, context_lengths: Array, attend: Attend, reduce: Reduce
    ) -> Array:
        """Hidden states after the final norm, ``[tokens, embed]``.

        Args:
            tokens, positions: int32 ``[tokens]``.
            context_lengths: int32 ``[tokens]``; see :func:`fly_jax.models.rope.rope_tables`.
        """
        x = jnp.take(self.embedding[...], tokens, axis=0)
        rope = rope_tables(self.config.rope, positions, context_lengths)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, rope, attend, reduce)
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)


class LMHead(nnx.Module):
    """The vocabulary projection, sharded by vocabulary rows. Tied models view the embedding table's buffer."""

    def __init__(self, config: ModelConfig, part: Partition, dtype: jnp.dtype) -> None:
        self.weight = parameter((part.vocab, config.hidden_size), ("vocab", "embed"), dtype)

    def __call__(self, hidden: Array) -> Array:
        """``hidden [rows, embed]`` -> this shard's float32 logits ``[rows, vocab / tp]``."""
        return linear(hidden, self.weight[...])
