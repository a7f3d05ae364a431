"""Initial weights that start close to an associative lookup, which saves most of the training.

A question is answered by matching its key against earlier text. From a plain random start, this
model had not found that after 0.9 million tokens, almost half of the whole run. So the residual
stream starts in two halves, and the attention in two steps:

- The first half holds token embeddings. Layer 0 reads them a fixed number of tokens back and
  writes them to the second half, so that some tokens know their neighbours: a value knows its key,
  and the end of a question knows the key that it asks about. A constant component of the
  embeddings makes such heads possible under RoPE.
- Layer 1 compares second halves, so that the end of a question finds the value whose key it names,
  and copies first halves, which is the answer.

This is only a start: all weights are trained from there. A word also starts from nearly the same
embedding with and without its leading space.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from checkpoints.demo.plain_llama import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_SCALE = 0.1
CONSTANT = 0.3  # component 0 of every embedding
# Tokens to look back in layer 0, one pair of query heads for each of the first key/value heads. In
# "- Mira: red kite" the key is 2 tokens before "red" and 3 before "kite"; in "Mira have? Answer: red
# kite", and in the chat form, it is 4 before the token that predicts "red" and 5 before the next.
LOOK_BACK = ((2, 4), (3, 5))
LOOK_BACK_SCORE = 50.0  # the attention score at exactly that distance
LOOK_BACK_PAIRS = 6  # RoPE components with the highest frequencies: only they tell neighbours apart
NEIGHBOUR_SCALE = 0.07  # of what layer 0 writes
MATCH_SCALE = 1.8  # of queries and keys of layer 1
MATCH_FIRST_PAIR = 5  # RoPE components with higher frequencies do not hold a match over a distance
COPY_SCALE = 0.15  # of what layer 1 writes


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
    weights = {name: np.array(weight) for name, weight in _random_weights(config, key).items()}
    _start_embeddings(weights, config, tokenizer)
    _look_back(weights, config)
    _match_and_copy(weights, config)
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}


def _random_weights(config: LlamaConfig, key: Array) -> dict[str, Array]:
    """Normal weights that keep the scale of their input; outputs to the residual stream are smaller."""
    shapes = weight_shapes(config)
    weights = {}
    for (name, shape), name_key in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = EMBEDDING_SCALE if name == EMBEDDING else (0.02 if residual else 1.0) / shape[-1] ** 0.5
        weights[name] = jnp.ones(shape) if len(shape) == 1 else scale * jax.random.normal(name_key, shape)
    return weights


def _start_embeddings(weights: dict[str, np.ndarray], config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Embeddings [V, D]: a constant, a random vector that "kite" and " kite" mostly share, then zeros."""
    embeddings = weights[EMBEDDING]
    vocabulary = tokenizer.get_vocab()
    shared = np.arange(config.vocab_size)
    for token, index in vocabulary.items():
        shared[index] = vocabulary.get(token.removeprefix("Ġ"), index)  # "Ġ" stands for the space
    embeddings = 0.8 * embeddings[shared] + 0.6 * embeddings
    embeddings[:, 0] = 0.0
    embeddings[:, config.hidden_size // 2 :] = 0.0
    # Equal norms keep the constant equally large in every token after the norm of layer 0.
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings *= EMBEDDING_SCALE * np.sqrt(config.hidden_size // 2) / norms
    embeddings[:, 0] = CONSTANT
    weights[EMBEDDING] = embeddings


def _look_back(weights: dict[str, np.ndarray], config: LlamaConfig) -> None:
    """Makes the first query heads of layer 0 attend LOOK_BACK tokens back, for _match_and_copy.

    The constant component of the input (about c after the norm) puts the same vector into every
    key, and that vector turned by -distance positions into every query of the head. RoPE turns both
    by their positions, so that they line up exactly at that distance. The two heads of a pair share
    their values and write them to neighbouring parts of the second half, the key's part first, so
    that what one of them saw can be compared with what the other saw.
    """
    size, hidden = config.head_dim, config.hidden_size
    half = size // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    constant = CONSTANT / np.sqrt(np.mean(weights[EMBEDDING] ** 2))
    pairs = np.arange(half) < LOOK_BACK_PAIRS
    amplitude = pairs * np.sqrt(LOOK_BACK_SCORE * np.sqrt(size) / LOOK_BACK_PAIRS) / constant
    q, k, v, o = (weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo")
    q *= 0.1
    k *= 0.1
    v[:, 0] = 0.0
    v[:, : hidden // 2] *= np.sqrt(2)
    o[:] = 0.0
    for group, distances in enumerate(LOOK_BACK):
        k[group * size : group * size + half, 0] = amplitude
        k[group * size + half : (group + 1) * size, 0] = 0.0
        for head, distance in enumerate(distances, start=len(distances) * group):
            rows = slice(head * size, (head + 1) * size)
            written = slice(hidden // 2 + rows.start, hidden // 2 + rows.stop)
            turns = -frequencies * distance
            q[rows, 0] = np.concatenate([amplitude * np.cos(turns), amplitude * np.sin(turns)])
            o[written, rows] = NEIGHBOUR_SCALE * np.eye(size)


def _match_and_copy(weights: dict[str, np.ndarray], config: LlamaConfig) -> None:
    """Makes layer 1 attend where a key's part is like its own query part, and copy from there.

    Key/value heads take turns with the pairs of LOOK_BACK. Each copies another part of the first
    half; the two query heads of its group start alike.
    """
    size, hidden = config.head_dim, config.hidden_size
    group_heads = config.num_attention_heads // config.num_key_value_heads
    q, k, v, o = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkvo")
    for projection in (q, k, v, o):
        projection *= 0.1
    match = MATCH_SCALE * np.diag(np.arange(size) % (size // 2) >= MATCH_FIRST_PAIR)
    for group in range(config.num_key_value_heads):
        rows = slice(group * size, (group + 1) * size)
        start = hidden // 2 + 2 * size * (group % len(LOOK_BACK))
        k[rows, start : start + size] += match
        v[rows, rows] += np.eye(size)
        for head in range(group_heads * group, group_heads * (group + 1)):
            columns = slice(head * size, (head + 1) * size)
            q[columns, start + size : start + 2 * size] += match
            o[rows, columns] += COPY_SCALE * np.eye(size)
