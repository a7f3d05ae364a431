"""Sampling on the device: every row on its own, whatever else is in the batch and whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from fly_jax.device.step_upload import NO_TOKEN
from fly_jax.sampling_params import MAX_LOGPROBS

_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingRows:
    """Options of the rows, inside a program: each ``[rows]``, float32 or int32.

    Attributes:
        masked_tokens: int32 ``[rows, MAX_MASKED_TOKENS]``, token ids that may not be sampled; ``NO_TOKEN`` is none.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed_high: Array
    seed_low: Array
    draw: Array
    top_logprobs: Array
    masked_tokens: Array

    @classmethod
    def of(cls, packed: dict[str, Array]) -> SamplingRows:
        """From the unpacked upload, where floats are bits."""

        def as_float(name: str) -> Array:
            return lax.bitcast_convert_type(packed[name], jnp.float32)

        names = ("top_k", "seed_high", "seed_low", "draw", "top_logprobs", "masked_tokens")
        integers = {name: packed[name] for name in names}
        return cls(as_float("temperature"), top_p=as_float("top_p"), min_p=as_float("min_p"), **integers)


def sample(logits: Array, rows: SamplingRows) -> Array:
    """Token ids, int32 ``[rows]``, from float32 ``logits [rows, vocabulary]``.

    Temperature first, then top-k, top-p over what is left, and min-p. Of equal logits the lowest id comes first, for
    each of them as for temperature 0. The draw is Gumbel noise from (seed, number of the output token) alone. Sorting
    runs only when some row truncates, noise only when some row is not greedy or masks tokens: both are decided on the
    device.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_greedy = rows.temperature < _GREEDY_BELOW
    masks = jnp.any(rows.masked_tokens != NO_TOKEN, axis=-1)

    def draw(_: None) -> Array:
        allowed = _masked(logits, rows.masked_tokens)
        truncates = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
        kept = lax.cond(
            jnp.any(truncates & ~is_greedy), lambda: what_is_kept(allowed, rows), lambda: _everything(allowed.shape)
        )
        noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(rows.seed_high, rows.seed_low, rows.draw, logits.shape[-1])
        scaled = allowed / rows.temperature[:, None] + noise
        drawn = jnp.where(kept.holds(allowed), scaled, -jnp.inf)
        return jnp.argmax(jnp.where(is_greedy[:, None], allowed, drawn), axis=-1).astype(jnp.int32)

    return lax.cond(jnp.all(is_greedy & ~masks), lambda _: greedy, draw, None)


def log_probabilities(logits: Array) -> Array:
    """Float32 ``[rows, vocabulary]``; all NaN in a row whose logits are no distribution.

    A logit of minus infinity is a token that cannot be; NaN, plus infinity, or nothing but minus infinity is a failure.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logits - jnp.where(jnp.isfinite(total), total, jnp.nan)


def results(logits: Array, tokens: Array, top_logprobs: Array) -> Array:
    """Tokens, their log-probabilities and the most likely alternatives as int32 bits, ``[rows, RESULT_COLUMNS]``;
    see :class:`fly_jax.scheduling.results.StepResults`.

    One array, so that one copy to the host carries everything; alternatives are zeros unless some row wants them.
    Log-probabilities are the model's own: before temperature, truncation and masked tokens.
    """
    logprobs = log_probabilities(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    values, ids = alternatives(logprobs, top_logprobs)
    bits = lax.bitcast_convert_type(jnp.concatenate([chosen, values], axis=1), jnp.int32)
    return jnp.concatenate([tokens[:, None], bits[:, :1], ids, bits[:, 1:]], axis=1)


def scores(logits: Array, targets: Array, top_logprobs: Array) -> tuple[Array, Array]:
    """What is asked of prompt tokens, as int32 bits: their log-probability and rank, and the alternatives.

    Two arrays, ``[rows, 2]`` and ``[rows, 2 * MAX_LOGPROBS]``: the second is copied only where somebody wants it.
    """
    logprobs = log_probabilities(logits)
    chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)
    rank = jnp.sum(logprobs >= chosen, axis=-1, keepdims=True, dtype=jnp.int32)
    values, ids = alternatives(logprobs, top_logprobs)
    own = jnp.concatenate([lax.bitcast_convert_type(chosen, jnp.int32), rank], axis=1)
    return own, jnp.concatenate([ids, lax.bitcast_convert_type(values, jnp.int32)], axis=1)


def alternatives(logprobs: Array, wanted: Array) -> tuple[Array, Array]:
    """The most likely tokens, float32 and int32 ``[rows, MAX_LOGPROBS]``; zeros unless some row wants them."""

    def most_likely(_: None) -> tuple[Array, Array]:
        count = min(MAX_LOGPROBS, logprobs.shape[-1])
        values, ids = lax.top_k(logprobs, count)
        pad = ((0, 0), (0, MAX_LOGPROBS - count))
        return jnp.pad(values, pad), jnp.pad(ids.astype(jnp.int32), pad)

    def nothing(_: None) -> tuple[Array, Array]:
        shape = (logprobs.shape[0], MAX_LOGPROBS)
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)

    return lax.cond(jnp.any(wanted > 0), most_likely, nothing, None)


def _masked(logits: Array, tokens: Array) -> Array:
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, tokens].set(-jnp.inf, mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """Which tokens each row keeps: those above ``floor``, and of those at it the ones with ids up to ``last_id``."""

    floor: Array
    last_id: Array

    def holds(self, logits: Array) -> Array:
        """Bool, of the shape of ``logits [rows, vocabulary]``."""
        ids, floor = jnp.arange(logits.shape[-1]), self.floor[:, None]
        return (logits > floor) | ((logits == floor) & (ids <= self.last_id[:, None]))


def _everything(shape: tuple[int, ...]) -> Kept:
    return Kept(jnp.full(shape[:1], -jnp.inf, jnp.float32), jnp.full(shape[:1], shape[-1], jnp.int32))


def what_is_kept(logits: Array, rows: SamplingRows) -> Kept:
    """What top-k, top-p and min-p leave of each row.

    Tokens are compared by their logits as they are: divided by a temperature, two that differ may become equal.
    """
    vocabulary = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    limit = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    # Only the first token is as likely as the most likely one: its equals come behind it.
    limit = jnp.where(rows.min_p >= 1.0, 1, limit)
    in_top_k = jnp.arange(vocabulary) < limit[:, None]
    temperature = jnp.where(rows.temperature < _GREEDY_BELOW, 1.0, rows.temperature)[:, None]
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ordered / temperature, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Summed in float32, the mass may reach 1 before the last token: with top_p 1 none is cut off for that.
    in_top_p = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1.0)
    kept = in_top_k & in_top_p & (probabilities >= rows.min_p[:, None] * probabilities[:, :1])
    count = jnp.max(jnp.where(kept.at[:, 0].set(True), jnp.arange(1, vocabulary + 1), 0), axis=-1)
    floor = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    return Kept(floor[:, 0], _last_equal(logits == floor, count - jnp.sum(ordered > floor, axis=-1)))


def _last_equal(equals: Array, count: Array) -> Array:
    """Id of the ``count``-th token that is in ``equals [rows, vocabulary]``: int32 ``[rows]``."""

    def find(_: None) -> Array:
        return jnp.argmax(jnp.cumsum(equals, axis=-1) >= count[:, None], axis=-1).astype(jnp.int32)

    def all_of_them(_: None) -> Array:
        return jnp.full(count.shape, equals.shape[-1], jnp.int32)

    return lax.cond(jnp.any(jnp.sum(equals, axis=-1) > count), find, all_of_them, None)


def _gumbel(seed_high: Array, seed_low: Array, draw: Array, vocabulary: int) -> Array:
    words = lax.bitcast_convert_type(jnp.stack([seed_high, seed_low]), jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), draw)
    return jax.random.gumbel(key, (vocabulary,), jnp.float32)
