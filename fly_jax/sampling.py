"""Sampling on the device: every row on its own, whatever else is in the batch and whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from fly_jax.sampling_params import MAX_LOGPROBS

RESULT_COLUMNS = 2 + 2 * MAX_LOGPROBS
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingRows:
    """Options of the rows, inside a program: each ``[rows]``, float32 or int32."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed_high: Array
    seed_low: Array
    draw: Array
    top_logprobs: Array

    @classmethod
    def of(cls, packed: dict[str, Array]) -> SamplingRows:
        """From the unpacked upload, where floats are bits."""

        def as_float(name: str) -> Array:
            return lax.bitcast_convert_type(packed[name], jnp.float32)

        integers = {name: packed[name] for name in ("top_k", "seed_high", "seed_low", "draw", "top_logprobs")}
        return cls(as_float("temperature"), top_p=as_float("top_p"), min_p=as_float("min_p"), **integers)


def sample(logits: Array, rows: SamplingRows) -> Array:
    """Token ids, int32 ``[rows]``, from float32 ``logits [rows, vocabulary]``.

    Temperature first, then top-k, top-p over what is left, and min-p. The draw is Gumbel noise from
    (seed, number of the output token) alone. Sorting runs only when some row truncates, sampling at all only when
    some row is not greedy: both are decided on the device.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_greedy = rows.temperature < _GREEDY_BELOW

    def draw(_: None) -> Array:
        scaled = logits / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
        truncates = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
        floor = lax.cond(
            jnp.any(truncates & ~is_greedy), lambda: _threshold(scaled, rows), lambda: jnp.full(greedy.shape, -jnp.inf)
        )
        kept = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(rows.seed_high, rows.seed_low, rows.draw, logits.shape[-1])
        return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)

    drawn = lax.cond(jnp.all(is_greedy), lambda _: greedy, draw, None)
    return jnp.where(is_greedy, greedy, drawn)


def results(logits: Array, tokens: Array, top_logprobs: Array) -> Array:
    """Tokens, their log-probabilities and the most likely alternatives as int32 bits, ``[rows, RESULT_COLUMNS]``.

    One array, so that one copy to the host carries everything; alternatives are zeros unless some row wants them.
    """
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)

    def alternatives(_: None) -> tuple[Array, Array]:
        count = min(MAX_LOGPROBS, logits.shape[-1])
        values, ids = lax.top_k(logprobs, count)
        pad = ((0, 0), (0, MAX_LOGPROBS - count))
        return jnp.pad(values, pad), jnp.pad(ids.astype(jnp.int32), pad)

    def nothing(_: None) -> tuple[Array, Array]:
        shape = (logits.shape[0], MAX_LOGPROBS)
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)

    values, ids = lax.cond(jnp.any(top_logprobs > 0), alternatives, nothing, None)
    bits = lax.bitcast_convert_type(jnp.concatenate([chosen, values], axis=1), jnp.int32)
    return jnp.concatenate([tokens[:, None], bits[:, :1], ids, bits[:, 1:]], axis=1)


def _threshold(scaled: Array, rows: SamplingRows) -> Array:
    """Smallest scaled logit that each row keeps, ``[rows]``."""
    vocabulary = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    limit = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    in_top_k = jnp.arange(vocabulary) < limit[:, None]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Summed in float32, the mass may reach 1 before the last token: with top_p 1 none is cut off for that.
    in_top_p = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1.0)
    kept = in_top_k & in_top_p & (probabilities >= rows.min_p[:, None] * probabilities[:, :1])
    return jnp.min(jnp.where(kept.at[:, 0].set(True), ordered, jnp.inf), axis=-1)


def _gumbel(seed_high: Array, seed_low: Array, draw: Array, vocabulary: int) -> Array:
    words = lax.bitcast_convert_type(jnp.stack([seed_high, seed_low]), jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), draw)
    return jax.random.gumbel(key, (vocabulary,), jnp.float32)
