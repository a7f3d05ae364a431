"""Reads a Hugging Face ``config.json`` into the one description that the decoder understands.

Everything that changes the numbers is read or refused by name; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_jax.errors import ConfigError
from fly_jax.host.json_files import read_json
from fly_jax.models.config_fields import refuse_unsupported
from fly_jax.models.rope import RopeConfig, parse_rope, positive_number

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_OLD_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}  # in the first folders of LLaMA

# What transformers takes where config.json is silent.
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_MISTRAL_WINDOW = 4096


@dataclass(frozen=True)
class ModelConfig:
    """A dense pre-norm decoder with gated MLP, grouped-query attention and rotary positions.

    Attributes:
        sliding_windows: one a layer: how many of the latest positions (its own included) a token sees; None: all.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: RMS norm over each query and key head (Qwen3).
        dtype: the checkpoint's own, ``float32``, ``bfloat16`` or ``float16``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: str

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads ``folder/config.json``.

        Raises:
            CheckpointError: the file is missing or not JSON.
            ConfigError: an architecture or field that is not supported.
        """
        return cls.from_hf(read_json(folder / "config.json"))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        architecture = _architecture(raw)
        family = ARCHITECTURES[architecture]
        refuse_unsupported(raw)
        heads, hidden = _positive(raw, "num_attention_heads"), _positive(raw, "hidden_size")
        kv_heads = _positive(raw, "num_key_value_heads", default=_DEFAULT_KV_HEADS.get(family, heads))
        head_dim = _positive(raw, "head_dim", default=128 if family == "qwen3" else hidden // heads)
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 16:
            raise ConfigError(f"head_dim {head_dim} is not supported: it must be a multiple of 16")
        if hidden % 2:
            raise ConfigError(f"hidden_size {hidden} is not supported: it must be even")
        bias = _flag(raw, "attention_bias")
        max_positions = _positive(raw, "max_position_embeddings", default=_DEFAULT_MAX_POSITIONS[family])
        return cls(
            architecture=architecture,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_number("config field rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_positions,
            tie_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=True if family == "qwen2" else bias,
            output_bias=bias if family in ("llama", "qwen3") else False,
            mlp_bias=_flag(raw, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(raw, family),
            rope=parse_rope(raw, head_dim, max_positions),
            dtype=_dtype(raw),
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        name = _OLD_NAMES.get(names[0], names[0])
        if name in ARCHITECTURES:
            return name
    raise ConfigError(f"architecture {names} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config field {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config field {name}={value!r} must be a positive integer")
    return value


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config field {name}={value!r} must be true or false")
    return bool(value)


def _sliding_windows(raw: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    layers = _positive(raw, "num_hidden_layers")
    window = raw.get("sliding_window", _DEFAULT_MISTRAL_WINDOW if family == "mistral" else None)
    if family in ("qwen2", "qwen3") and not _flag(raw, "use_sliding_window"):
        window = None
    if window is None:
        return (None,) * layers
    if family == "llama":
        if isinstance(window, int) and window >= _positive(
            raw, "max_position_embeddings", _DEFAULT_MAX_POSITIONS[family]
        ):
            return (None,) * layers  # a window as wide as the context
        raise ConfigError(f"config field sliding_window={window!r} is not supported for Llama")
    window = _positive({"sliding_window": window}, "sliding_window")
    if (types := raw.get("layer_types")) is not None:
        known = {"full_attention": None, "sliding_attention": window}
        if not isinstance(types, list) or len(types) != layers or any(t not in list(known) for t in types):
            raise ConfigError(f"config field layer_types={types!r} must name {layers} of {', '.join(known)}")
        return tuple(known[t] for t in types)
    if family == "mistral":
        return (window,) * layers
    first = raw.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ConfigError(f"config field max_window_layers={first!r} must be a whole number of at least 0")
    return tuple(window if layer >= first else None for layer in range(layers))


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"config field torch_dtype={name!r} is not supported; it must be float32, bfloat16 or float16"
        )
    return name
