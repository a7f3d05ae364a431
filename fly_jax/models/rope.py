"""Rotary position embeddings with every scaling that Llama-family checkpoints use.

Source: transformers ``modeling_rope_utils`` (ROPE_INIT_FUNCTIONS); YaRN: arXiv 2309.00071.
Frequencies are computed once on the host in float64 and enter the programs as float32 constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fly_jax.errors import ConfigError

_OPTIONS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "original_max_position_embeddings", "truncate",
    },
}  # fmt: skip
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


# Options that transformers does not read for a kind, and that say nothing at these values; None: at any.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "attn_factor": (1,),  # vLLM and llama.cpp multiply by it, transformers does not
    "extrapolation_factor": (1,),
    "partial_rotary_factor": (1,),
    "finetuned": None,
    "original_max_position_embeddings": None,
}


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into rotations.

    Attributes:
        kind: ``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``.
        original_max_positions: the context that the model was trained at before scaling.
        options: the scaling's own numbers, by their Hugging Face names.
    """

    kind: str
    theta: float
    head_dim: int
    original_max_positions: int
    options: tuple[tuple[str, float], ...] = ()

    def option(self, name: str, default: float | None = None) -> float:
        value = dict(self.options).get(name, default)
        assert value is not None, f"{name} was checked when the config was read"
        return value

    def inverse_frequencies(self) -> np.ndarray:
        """Radians per position, float32 ``[head_dim / 2]``; for ``dynamic``, those within the original context."""
        base = _base_frequencies(self.theta, self.head_dim)
        if self.kind == "linear":
            base = base / self.option("factor")
        elif self.kind == "llama3":
            base = _llama3(self, base)
        elif self.kind == "yarn":
            base = _yarn(self, base)
        return base.astype(np.float32)

    def attention_scaling(self) -> float:
        """What cosine and sine are multiplied by (YaRN's temperature; 1 elsewhere)."""
        if self.kind != "yarn":
            return 1.0
        given = dict(self.options)
        if "attention_factor" in given:
            return given["attention_factor"]
        factor = self.option("factor")
        if given.get("mscale") and given.get("mscale_all_dim"):
            return _yarn_mscale(factor, given["mscale"]) / _yarn_mscale(factor, given["mscale_all_dim"])
        return _yarn_mscale(factor, 1.0)


def parse_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """Reads ``rope_scaling`` + ``rope_theta`` (transformers 4) or ``rope_parameters`` (transformers 5).

    Raises:
        ConfigError: an unknown scaling or option, or a missing one.
    """
    settings = _settings(raw)
    kind = str(settings.pop("rope_type", settings.pop("type", "default")))
    settings.pop("type", None)
    theta = raw.get("rope_theta")
    theta = positive_number("config field rope_theta", settings.pop("rope_theta", 10000.0 if theta is None else theta))
    if kind not in _OPTIONS:
        raise ConfigError(f"rope_scaling type {kind!r} is not supported; supported: {', '.join(_OPTIONS)}")
    settings = {name: value for name, value in settings.items() if _is_read(kind, name, value)}
    for name in _REQUIRED.get(kind, ()):
        if name not in settings:
            raise ConfigError(f"rope_scaling option {name!r} is missing for type {kind!r}")
    original = settings.pop("original_max_position_embeddings", max_positions)
    if (outer := raw.get("original_max_position_embeddings")) is not None:
        original = outer
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise ConfigError(f"config field original_max_position_embeddings={original!r} must be a positive integer")
    if kind == "dynamic":
        original = max_positions  # transformers scales from max_position_embeddings and ignores the original
    options = tuple(sorted((name, _option(name, value)) for name, value in settings.items()))
    return RopeConfig(kind, theta, head_dim, original, options)


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not null, from whichever field has them.

    Raises:
        ConfigError: no object, or both fields are there and differ.
    """
    fields = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, value in fields.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"config field {name}={value!r} must be an object")
    merged: dict[str, Any] = {}
    for options in fields.values():
        for option, value in options.items():
            if value is not None and (first := merged.setdefault(option, value)) is not value and first != value:
                raise ConfigError(
                    f"config fields rope_scaling and rope_parameters give {option!r} as {first!r} and as "
                    f"{value!r}: keep the one that the model was trained with"
                )
    return merged


def _is_read(kind: str, name: str, value: Any) -> bool:
    """Whether the kind has the option; False where it may be ignored.

    Raises:
        ConfigError: the option is neither known nor without effect.
    """
    if name in _OPTIONS[kind]:
        return True
    if name in _NEUTRAL:
        neutral = _NEUTRAL[name]
        if neutral is None or (not isinstance(value, bool) and value in neutral):
            return False
        raise ConfigError(f"rope_scaling option {name}={value!r} is not supported; it must be {neutral[0]!r}")
    raise ConfigError(f"rope_scaling option {name!r} is not supported for type {kind!r}")


def positive_number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{what}={value!r} must be a positive number")
    return float(value)


def _option(name: str, value: Any) -> float:
    if (name == "truncate" and isinstance(value, bool)) or (name.startswith("mscale") and value == 0):
        return float(value)
    return positive_number(f"rope_scaling option {name!r}", value)


def rope_tables(rope: RopeConfig, positions: Array, context_lengths: Array) -> tuple[Array, Array]:
    """Cosine and sine, each float32 ``[tokens, head_dim / 2]``.

    Args:
        positions: int32 ``[tokens]``.
        context_lengths: int32 ``[tokens]``: the sequence length that ``dynamic`` scales by; other kinds ignore it.
    """
    if rope.kind == "dynamic":
        inverse = _dynamic(rope, context_lengths)
    else:
        inverse = jnp.asarray(rope.inverse_frequencies())[None, :]
    angles = positions.astype(jnp.float32)[:, None] * inverse
    scaling = rope.attention_scaling()
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates halves: ``x [tokens, heads, head_dim]`` by tables ``[tokens, head_dim / 2]``, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _dynamic(rope: RopeConfig, context_lengths: Array) -> Array:
    """NTK-aware base that grows with the context beyond the original one; ``[tokens, head_dim / 2]``."""
    original, factor, dim = rope.original_max_positions, rope.option("factor"), rope.head_dim
    length = jnp.maximum(context_lengths.astype(jnp.float32), original)
    theta = rope.theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    exponent = jnp.asarray(np.arange(0, dim, 2, dtype=np.float64) / dim, jnp.float32)
    return 1.0 / theta[:, None] ** exponent[None, :]


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    low, high = rope.option("low_freq_factor"), rope.option("high_freq_factor")
    factor, original = rope.option("factor"), rope.original_max_positions
    wavelength = 2 * math.pi / base
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    dim, original = rope.head_dim, rope.original_max_positions

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.option("beta_fast", 32.0)), dimension_of(rope.option("beta_slow", 1.0))
    if rope.option("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return base / rope.option("factor") * interpolated + base * (1 - interpolated)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
