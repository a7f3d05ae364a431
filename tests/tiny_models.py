"""Tiny random-weight models in the Hugging Face folder format.

``CASES`` maps a case name to the content of a ``config.json``; ``write_model`` turns such a config into a
complete model folder (config, generation config, safetensors weights, tokenizer with a chat template).

Every weight is a pure function of (seed, parameter name, shape): a sum of raw random integers and one
scaling, without transcendental functions, so that it does not depend on the machine or the numpy version.
``fingerprint`` hashes config and weights.

Config spelling: up to transformers 4 the rotary settings are ``rope_theta`` (top level) and ``rope_scaling``;
transformers 5 writes one ``rope_parameters`` dict and ``dtype`` instead of ``torch_dtype``. Cases wrapped in
``modern_spelling`` use the latter, all others the former.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Config = dict[str, Any]
Shape = tuple[int, ...]

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
IM_START_TOKEN = "<|im_start|>"
IM_END_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, IM_START_TOKEN, IM_END_TOKEN)
"""Special tokens take the ids 256, 257, ... directly after the 256 byte symbols."""

BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = range(256, 256 + len(SPECIAL_TOKENS))

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# ------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _config(model_type: str, **overrides: Any) -> Config:
    """The settings shared by the cases; an override of ``...`` removes the key."""
    config: Config = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 320,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not ...}


def _llama(**overrides: Any) -> Config:
    return _config("llama", **overrides)


def _mistral(**overrides: Any) -> Config:
    return _config("mistral", **overrides)


def _qwen2(**overrides: Any) -> Config:
    """Qwen2 checkpoints carry a sliding window setting that ``use_sliding_window: false`` switches off."""
    settings: Config = {
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-6,
    }
    return _config("qwen2", **(settings | overrides))


def _qwen3(**overrides: Any) -> Config:
    settings: Config = {
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    }
    return _config("qwen3", **(settings | overrides))


def _llama_rope(rope_scaling: Config, *, max_position_embeddings: int = 128, **overrides: Any) -> Config:
    """A llama with head_dim 32: 16 rotary frequencies populate every frequency band of a scaling."""
    settings: Config = {"hidden_size": 128, "max_position_embeddings": max_position_embeddings}
    return _llama(**(settings | {"rope_scaling": rope_scaling} | overrides))


def modern_spelling(config: Config) -> Config:
    """The same config as transformers 5 writes it, with ``rope_parameters``."""
    config = copy.deepcopy(config)
    scaling = config.pop("rope_scaling", None) or {}
    theta = config.pop("rope_theta", 10000.0)
    rope_type = scaling.pop("type", "default")
    config["rope_parameters"] = {"rope_type": rope_type, **scaling, "rope_theta": theta}
    return config


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, Config] = {
    # Llama-2 style file: multi-head attention, untied, rope_theta / head_dim / biases left to their defaults.
    "llama_mha": _llama(num_key_value_heads=4, rope_theta=..., rope_scaling=None, pretraining_tp=1),
    # Only the required keys; kv heads default to the number of heads, the output is untied, eps is 1e-6.
    "llama_minimal": _llama(
        num_key_value_heads=...,
        rope_theta=...,
        tie_word_embeddings=...,
        rms_norm_eps=...,
        max_position_embeddings=...,
    ),
    "llama_gqa_tied": modern_spelling(_llama(tie_word_embeddings=True, num_hidden_layers=3)),
    "llama_head_dim": _llama(head_dim=32),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True),
    "llama_rms_norm_eps": _llama(rms_norm_eps=0.05),
    "llama_rope_theta": _llama(rope_theta=50.0),
    # Rotary scalings. Prompts of the golden values are 40 and 100 tokens, past the original 32 positions; the
    # "dynamic" case has 64 so that its first prompt is unscaled and its second one scaled.
    "llama_rope_linear": _llama_rope({"type": "linear", "factor": 4.0}),
    "llama_rope_linear_modern": modern_spelling(_llama_rope({"type": "linear", "factor": 4.0})),
    "llama_rope_dynamic": _llama_rope({"type": "dynamic", "factor": 4.0}, max_position_embeddings=64),
    "llama_rope_llama3": _llama_rope(_LLAMA3),
    "llama_rope_llama3_modern": modern_spelling(_llama_rope(_LLAMA3, rope_theta=500000.0, tie_word_embeddings=True)),
    "llama_rope_yarn": modern_spelling(_llama_rope(_YARN)),
    "llama_rope_yarn_attention_factor": _llama_rope(
        _YARN | {"attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.5}
    ),
    "llama_rope_yarn_mscale": _llama_rope(
        _YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 3.0, "truncate": False}
    ),
    # The default beta_fast of 32 has an effect only from 202 original positions on.
    "llama_rope_yarn_long": _llama_rope(
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, max_position_embeddings=2048
    ),
    # Head counts: ratios 3 and 7, multi-query, fewer kv heads than tensor-parallel ranks, counts that no
    # power-of-two rank count divides.
    "llama_heads_6_kv_2": _llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=2),
    "llama_heads_9_kv_3_tied": _llama(
        hidden_size=144, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "llama_heads_8_kv_1": _llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=1),
    "llama_heads_8_kv_2": _llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=2),
    "llama_heads_5_kv_5": _llama(hidden_size=80, num_attention_heads=5, num_key_value_heads=5),
    "qwen2_heads_7_kv_1": _qwen2(hidden_size=112, num_attention_heads=7, num_key_value_heads=1),
    # Sizes that no power-of-two rank count divides.
    "llama_ffn_90": _llama(intermediate_size=90),
    "llama_vocab_323": _llama(vocab_size=323),
    "llama_vocab_323_tied": _llama(vocab_size=323, tie_word_embeddings=True),
    # Mistral: every layer windowed, or none.
    "mistral_window": _mistral(sliding_window=16, num_hidden_layers=3),
    "mistral_no_window": modern_spelling(_mistral(sliding_window=None, head_dim=32, rope_theta=1000000.0)),
    # Qwen2: bias on q, k, v; windows only from layer max_window_layers on.
    "qwen2": _qwen2(),
    "qwen2_tied": modern_spelling(_qwen2(tie_word_embeddings=True, rope_theta=1000000.0)),
    "qwen2_window": _qwen2(use_sliding_window=True, num_hidden_layers=3),
    "qwen2_rope_yarn": _qwen2(
        hidden_size=128,
        max_position_embeddings=128,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    # Qwen3: normalised q and k, explicit head_dim.
    "qwen3": _qwen3(),
    "qwen3_tied": modern_spelling(_qwen3(tie_word_embeddings=True, layer_types=["full_attention"] * 2)),
    "qwen3_attention_bias": _qwen3(attention_bias=True),
    # An explicit layer_types list takes precedence over max_window_layers.
    "qwen3_layer_types": modern_spelling(
        _qwen3(
            use_sliding_window=True,
            sliding_window=16,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}

# ------------------------------------------------------------------------------
# Parameters
# ------------------------------------------------------------------------------


def head_dim(config: Config) -> int:
    """Size of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _layer_shapes(config: Config, layer: int) -> Iterator[tuple[str, Shape]]:
    model_type, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = head_dim(config)
    out_bias = model_type in ("llama", "qwen3") and config.get("attention_bias", False)
    qkv_bias = out_bias or model_type == "qwen2"
    mlp_bias = model_type == "llama" and config.get("mlp_bias", False)
    prefix = f"model.layers.{layer}"
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield from _linear(f"{prefix}.self_attn.q_proj", heads * dim, hidden, qkv_bias)
    yield from _linear(f"{prefix}.self_attn.k_proj", kv_heads * dim, hidden, qkv_bias)
    yield from _linear(f"{prefix}.self_attn.v_proj", kv_heads * dim, hidden, qkv_bias)
    yield from _linear(f"{prefix}.self_attn.o_proj", hidden, heads * dim, out_bias)
    if model_type == "qwen3":
        yield f"{prefix}.self_attn.q_norm.weight", (dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (dim,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield from _linear(f"{prefix}.mlp.gate_proj", ffn, hidden, mlp_bias)
    yield from _linear(f"{prefix}.mlp.up_proj", ffn, hidden, mlp_bias)
    yield from _linear(f"{prefix}.mlp.down_proj", hidden, ffn, mlp_bias)


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Names and shapes of the stored tensors, in model order; a tied output projection is not stored."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        shapes.update(_layer_shapes(config, layer))
    shapes["model.norm.weight"] = (config["hidden_size"],)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return shapes


_GAINS = {"embed_tokens": 2.0, "lm_head": 2.0, "q_proj": 1.5, "k_proj": 1.5, "q_norm": 1.5, "k_norm": 1.5}


def _noise(name: str, shape: Shape, seed: int) -> np.ndarray:
    """Unit-variance, nearly normal float64 noise: sums of four 16-bit integers of a raw Philox stream."""
    key = zlib.crc32(f"{name}{list(shape)}".encode()) + (seed << 32)
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    total = sum((raw >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    mean, deviation = 2.0 * 65535.0, 65536.0 / math.sqrt(3.0)
    return ((np.asarray(total, dtype=np.float64) - mean) / deviation).reshape(shape)


def parameter(name: str, shape: Shape, *, seed: int = 0) -> np.ndarray:
    """One float32 parameter. Scaled to give attention scores and logits a standard deviation of about 2."""
    noise = _noise(name, shape, seed)
    module = name.split(".")[-2]
    gain = _GAINS.get(module, 1.0)
    if module.endswith("norm"):
        value = gain * (1.0 + 0.2 * noise)
    elif name.endswith(".bias"):
        value = 0.5 * noise
    else:
        value = gain / math.sqrt(shape[-1]) * noise
    return value.astype(np.float32)


def parameters(config: Config, *, seed: int = 0) -> dict[str, np.ndarray]:
    """All float32 parameters of a model, in model order."""
    return {name: parameter(name, shape, seed=seed) for name, shape in parameter_shapes(config).items()}


def fingerprint(config: Config, *, seed: int = 0) -> str:
    """SHA-256 over the config and all float32 weights: changes when a model's outputs could change."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in parameters(config, seed=seed).items():
        digest.update(name.encode())
        digest.update(value.astype("<f4").tobytes())
    return digest.hexdigest()


def random_token_ids(length: int, vocab_size: int, *, seed: int = 0) -> list[int]:
    """Deterministic, roughly uniform token ids."""
    return [int(value % vocab_size) for value in np.random.Philox(key=seed).random_raw(length)]


# ------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------

_MERGES = (
    ("Ġ", "t"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"),
    ("Ġt", "he"), ("o", "r"), ("Ġ", "s"), ("e", "n"), ("Ġ", "w"), ("i", "t"), ("Ġ", "o"), ("in", "g"),
    ("Ã", "©"), ("l", "l"), ("e", "d"), ("Ġ", "c"), ("an", "d"), ("o", "u"), ("Ġ", "b"), ("ð", "Ł"),
)  # fmt: skip
"""Merges in byte-level symbols; two of them form (parts of) multi-byte UTF-8 characters."""

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (the GPT-2 table)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _adds_bos(config: Config) -> bool:
    return config["model_type"] in ("llama", "mistral")


def _vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte symbols, special tokens, then as many merges as fit.

    The special tokens are part of the vocabulary because otherwise they get the ids after the last merge.
    """
    first_merge = 256 + len(SPECIAL_TOKENS)
    if vocab_size < first_merge:
        raise ValueError(f"vocab_size {vocab_size} is below the minimum of {first_merge}")
    merges = list(_MERGES[: vocab_size - first_merge])
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocab.update({token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    vocab.update({left + right: first_merge + i for i, (left, right) in enumerate(merges)})
    return vocab, merges


def _post_processor(config: Config) -> Config:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    if not _adds_bos(config):
        return byte_level
    bos = {"SpecialToken": {"id": BOS_TOKEN, "type_id": 0}}
    first, second = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {BOS_TOKEN: {"id": BOS_TOKEN, "ids": [BOS_ID], "tokens": [BOS_TOKEN]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _added_token(content: str) -> Config:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": True}


def tokenizer_json(config: Config) -> Config:
    """Content of ``tokenizer.json``: a byte-level BPE.

    Ids past the last merge have no token, as in checkpoints whose vocabulary is padded.
    """
    vocab, merges = _vocabulary(config["vocab_size"])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, **_added_token(token)} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": _post_processor(config),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def tokenizer_config(config: Config) -> Config:
    """Content of ``tokenizer_config.json``; the ChatML template starts with BOS where the tokenizer does."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(256 + i): _added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "chat_template": ("{{ bos_token }}" if _adds_bos(config) else "") + _CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", 2048),
    }


# ------------------------------------------------------------------------------
# Folder
# ------------------------------------------------------------------------------


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(directory: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(list(tensors), num_shards), start=1):
        file_name = f"model-{i:05d}-of-{num_shards:05d}.safetensors"
        save_file({str(name): tensors[name] for name in names}, directory / file_name, metadata=metadata)
        weight_map.update({str(name): file_name for name in names})
    total_size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def write_model(directory: Path, config: Config, *, seed: int = 0, dtype: str = "float32", num_shards: int = 1) -> None:
    """Write a complete model folder: config, generation config, weights and tokenizer.

    With ``num_shards`` > 1 the weights go to ``model-0000i-of-0000n.safetensors`` files and an index; the
    split is by tensor count in model order, so a layer can span two files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype_key = "dtype" if "rope_parameters" in config else "torch_dtype"
    tensors = {name: value.astype(_DTYPES[dtype]) for name, value in parameters(config, seed=seed).items()}
    _write_weights(directory, tensors, num_shards)
    _write_json(directory / "config.json", config | {dtype_key: dtype})
    generation = {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, IM_END_ID]}
    _write_json(directory / "generation_config.json", {"_from_model_config": False, **generation})
    _write_json(directory / "tokenizer.json", tokenizer_json(config))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(config))
