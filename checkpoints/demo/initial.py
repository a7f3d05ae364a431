"""Initial weights that start close to an associative lookup, which saves most of the training.

From a plain random start, a small model spends millions of tokens before it finds that a question
is answered by matching its key against earlier text. Three choices put it next to that solution:

- The heads of layer 0 look a fixed number of tokens back, so every token knows its neighbours: a
  value knows its key. RoPE makes this possible from a constant component of the embeddings.
- In later layers keys start equal to queries, so a token attends to tokens with similar contents,
  and the output projection starts as the transpose of the value projection, so it copies them.
- A word starts from nearly the same embedding with and without its leading space.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from checkpoints.demo.plain_llama import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_SCALE = 0.06
CONSTANT = 0.3  # the constant component of every embedding
LOOK_BACK = (1, 2, 3, 4, 5, 6, 7, 2)  # tokens, for each query head of layer 0
LOOK_BACK_SCORE = 8.0  # the attention score at exactly that distance
COPY_SCALE = 0.3


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight of a model with tied embeddings."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (queries, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, queries),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def initial_weights(config: LlamaConfig, tokenizer: Tokenizer, key: Array) -> dict[str, Array]:
    """Float32 weights under their Hugging Face names."""
    weights = _random_weights(config, key)
    weights[EMBEDDING] = _share_embeddings(weights[EMBEDDING], tokenizer).at[:, 0].set(CONSTANT)
    _look_back(weights, config)
    for layer in range(1, config.num_hidden_layers):
        _match_and_copy(weights, config, f"model.layers.{layer}.self_attn.")
    return weights


def _random_weights(config: LlamaConfig, key: Array) -> dict[str, Array]:
    """Normal weights that keep the scale of their input; outputs to the residual stream are smaller."""
    shapes = weight_shapes(config)
    weights = {}
    for (name, shape), name_key in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = EMBEDDING_SCALE if name == EMBEDDING else (0.2 if residual else 1.0) / shape[-1] ** 0.5
        weights[name] = jnp.ones(shape) if len(shape) == 1 else scale * jax.random.normal(name_key, shape)
    return weights


def _share_embeddings(embeddings: Array, tokenizer: Tokenizer) -> Array:
    """Embeddings [V, D] in which "kite" and " kite" share most of their direction."""
    vocabulary = tokenizer.get_vocab()
    shared = np.arange(embeddings.shape[0])
    for token, index in vocabulary.items():
        shared[index] = vocabulary.get(token.removeprefix("Ġ"), index)  # "Ġ" stands for the space
    return 0.8 * embeddings[shared] + 0.6 * embeddings


def _look_back(weights: dict[str, Array], config: LlamaConfig) -> None:
    """Makes query head h of layer 0 attend LOOK_BACK[h] tokens back.

    The constant component of the input (about c after the norm) writes the same vector into every
    key, and the vector turned by -distance positions into every query of the head. RoPE turns both
    by their positions, so that they line up exactly at that distance.
    """
    pairs = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(pairs) / pairs)
    embeddings = np.asarray(weights[EMBEDDING])
    constant = CONSTANT / np.sqrt(np.mean(embeddings**2))
    amplitude = np.sqrt(LOOK_BACK_SCORE * np.sqrt(config.head_dim) / pairs) / constant
    prefix = "model.layers.0.self_attn."
    shape = (-1, config.head_dim, config.hidden_size)
    queries = 0.3 * np.array(weights[prefix + "q_proj.weight"]).reshape(shape)
    keys = 0.3 * np.array(weights[prefix + "k_proj.weight"]).reshape(shape)
    keys[:, :pairs, 0], keys[:, pairs:, 0] = amplitude, 0.0
    for head, distance in enumerate(LOOK_BACK):
        queries[head, :pairs, 0] = amplitude * np.cos(-frequencies * distance)
        queries[head, pairs:, 0] = amplitude * np.sin(-frequencies * distance)
    weights[prefix + "q_proj.weight"] = jnp.asarray(queries.reshape(-1, config.hidden_size))
    weights[prefix + "k_proj.weight"] = jnp.asarray(keys.reshape(-1, config.hidden_size))


def _match_and_copy(weights: dict[str, Array], config: LlamaConfig, prefix: str) -> None:
    """Makes a layer attend to tokens with contents like its own and copy what it reads."""
    group = config.num_attention_heads // config.num_key_value_heads
    shape = (config.num_key_value_heads, config.head_dim, config.hidden_size)

    def for_query_heads(projection: Array) -> Array:
        return jnp.repeat(projection.reshape(shape), group, axis=0).reshape(-1, config.hidden_size)

    weights[prefix + "q_proj.weight"] = for_query_heads(weights[prefix + "k_proj.weight"])
    weights[prefix + "o_proj.weight"] = COPY_SCALE * for_query_heads(weights[prefix + "v_proj.weight"]).T
