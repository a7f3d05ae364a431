"""What each field of a ``config.json`` means to the decoder: nothing, nothing at these values, or a refusal.

Sources: the fields that transformers' ``PretrainedConfig``, ``LlamaConfig``, ``MistralConfig``, ``Qwen2Config`` and
``Qwen3Config`` write (4.57 and 5.24; the former leave the defaults of generation in config.json), and those that
folders published for these architectures carry, written by trainers, converters and browsers' runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fly_jax.errors import ConfigError

# Read by ``models/config.py`` and ``models/rope.py``.
_READ = frozenset({
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
    "torch_dtype", "dtype", "original_max_position_embeddings",
})  # fmt: skip

# Where it came from, and what it was written for.
_ORIGIN = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class", "finetuning_task",
    "problem_type", "task_specific_params", "prefix", "id2label", "label2id", "num_labels", "is_decoder",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "unsloth_tokenizer", "mlc_version", "optimum_version",
    "transformers.js_config", "neuron", "model_max_length", "max_sequence_length", "tokenizer_model_max_length",
    "tokenizer_padding_side", "seq_length", "_from_model_config", "internal_version",
})  # fmt: skip
# Token ids are read from the tokenizer and from generation_config.json; sampling is the request's.
_GENERATION = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "bos_token",
    "eos_token", "pad_token", "unk_token_id", "max_length", "min_length", "max_new_tokens", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
})  # fmt: skip
# Training only.
_TRAINING = frozenset({
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "residual_dropout", "classifier_dropout",
    "gradient_checkpointing", "use_gradient_checkpointing", "neftune_noise_alpha", "tf_legacy_loss",
    "router_aux_loss_coef", "output_router_logits", "aux_loss_alpha",
})  # fmt: skip
# How a program computes the same numbers, or which of them it returns.
_EXECUTION = frozenset({
    "use_cache", "pretraining_tp", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "chunk_size_feed_forward", "num_logits_to_keep",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
    "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "flash_attention",
    "keys_to_ignore_at_inference", "use_fused_rms_norm", "use_fused_rope",
})  # fmt: skip
_HARMLESS = _ORIGIN | _GENERATION | _TRAINING | _EXECUTION

_QUANTISED = ("quantization_config", "quantization")  # the latter is MLX's

# Fields that change the numbers unless they have one of these values; null is always one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "use_qkv_bias": (),
    "use_parallel_residual": (False,),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "cross_attention_layers": ([],),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "clip_qkv": (),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "num_nextn_predict_layers": (0,),
    "attention_out_bias": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "log_scale": (False,),
    "rope_condense_ratio": (1,),
    "use_mla": (False,),
    "activation": ("silu", "swish", "swiglu"),
}


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuses a config that asks for what the decoder does not do, or that might.

    Raises:
        ConfigError: the first such field, by name and value.
    """
    for name in _QUANTISED:
        if raw.get(name):
            raise ConfigError(
                f"config field {name}={_method(raw[name])!r} says that the weights are quantised, which is not "
                "supported: give the folder of the model before quantisation"
            )
    for name, value in raw.items():
        if value is None or name in _READ or name in _HARMLESS or name in _QUANTISED:
            continue
        if name == "auto_map":
            _refuse_own_code(value)
        elif name in _NEUTRAL:
            if not _is_one_of(value, _NEUTRAL[name]):
                expected = repr(_NEUTRAL[name][0]) if _NEUTRAL[name] else "left out"
                raise ConfigError(f"config field {name}={value!r} is not supported; it must be {expected}")
        else:
            raise ConfigError(
                f"config field {name}={value!r} is not known, and is not guessed: remove it if it has no effect"
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config field hidden_act={raw['hidden_act']!r} is not supported; it must be 'silu'")


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equality that keeps booleans apart from numbers."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _method(value: Any) -> Any:
    """The part of a quantisation's settings that names it: they may list hundreds of modules."""
    if not isinstance(value, Mapping):
        return value
    return {name: value[name] for name in ("quant_method", "mode", "bits") if name in value} or "..."


def _refuse_own_code(auto_map: Any) -> None:
    """A folder's own tokenizer or config class changes no numbers; its own model class may."""
    classes = auto_map if isinstance(auto_map, Mapping) else {"AutoModel": auto_map}
    for name, code in classes.items():
        if "Model" in str(name):
            raise ConfigError(
                f"config field auto_map={{{name!r}: {code!r}}} names model code in the folder, which is never run: "
                "remove auto_map if the architecture alone describes the model"
            )
