from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fly_jax.errors import CheckpointError, ConfigError
from fly_jax.models.config import ARCHITECTURES, ModelConfig
from tests.tiny_models import CASES

ARCHITECTURE_OF = {family: name for name, family in ARCHITECTURES.items()}


def raw_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A minimal ``config.json``; ``...`` removes a field."""
    raw = {
        "architectures": [ARCHITECTURE_OF[family]],
        "model_type": family,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "head_dim": 16,
    }
    return {name: value for name, value in (raw | overrides).items() if value is not ...}


def read(family: str = "llama", **overrides: Any) -> ModelConfig:
    return ModelConfig.from_hf(raw_config(family, **overrides))


@pytest.mark.parametrize("case", CASES)
def test_every_tiny_model_is_read(case: str) -> None:
    config = ModelConfig.from_hf(CASES[case])
    assert len(config.sliding_windows) == config.num_layers


@pytest.mark.parametrize(
    ("family", "kv_heads", "max_positions", "windows"),
    [
        ("llama", 32, 2048, (None,) * 3),
        ("mistral", 8, 131072, (4096,) * 3),
        ("qwen2", 32, 32768, (None,) * 3),
        ("qwen3", 32, 32768, (None,) * 3),
    ],
)
def test_a_silent_config_gets_the_defaults_of_transformers(
    family: str, kv_heads: int, max_positions: int, windows: tuple[int | None, ...]
) -> None:
    config = read(family)
    assert config.num_kv_heads == kv_heads
    assert config.max_position_embeddings == max_positions
    assert config.sliding_windows == windows
    assert config.rms_norm_eps == 1e-6
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)
    assert not config.tie_embeddings
    assert config.dtype == "float32"


@pytest.mark.parametrize(("family", "expected"), [("llama", 32), ("mistral", 32), ("qwen2", 32), ("qwen3", 128)])
def test_head_dim_defaults_to_hidden_over_heads_except_where_the_family_fixes_it(family: str, expected: int) -> None:
    assert read(family, head_dim=..., num_attention_heads=8, num_key_value_heads=8).head_dim == expected


@pytest.mark.parametrize(
    ("family", "qkv", "output", "mlp", "norm"),
    [
        ("llama", True, True, True, False),
        ("mistral", True, False, True, False),
        ("qwen2", True, False, True, False),
        ("qwen3", True, True, True, True),
    ],
)
def test_biases_and_norms_follow_the_family(family: str, qkv: bool, output: bool, mlp: bool, norm: bool) -> None:
    config = read(family, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (qkv, output, mlp, norm)
    plain = read(family)
    assert (plain.qkv_bias, plain.output_bias, plain.mlp_bias) == (family == "qwen2", False, False)


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 16}, (16, 16, 16)),
        ("qwen2", {"sliding_window": 16}, (None, None, None)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (None, 16, 16)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, (None, None, None)),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, None, 16),
        ),
    ],
)
def test_sliding_windows_are_per_layer(family: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(family, **fields).sliding_windows == windows


@pytest.mark.parametrize("spelling", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_the_dtype_is_read_in_both_spellings(spelling: str, value: str) -> None:
    assert read(**{spelling: value}).dtype == "bfloat16"


@pytest.mark.parametrize(
    "architectures",
    [
        ...,
        None,
        [],
        ["MixtralForCausalLM"],
        ["LlamaForCausalLM", "MistralForCausalLM"],
        ["llamaforcausallm"],
        [["x"]],
        3,
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(architectures: Any) -> None:
    with pytest.raises(ConfigError, match=r"architecture .* is not supported; supported: LlamaForCausalLM, Mistral"):
        read(architectures=architectures)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [..., None])
def test_a_missing_size_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config field {field} is missing"):
        read(**{field: value})


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["32", 0, -1, 2.0, True, [32]])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config field {field}="):
        read(**{field: value})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "tie_word_embeddings", "false"),
        ("llama", "attention_bias", "no"),
        ("llama", "mlp_bias", 2),
        ("qwen2", "use_sliding_window", "false"),
        ("llama", "rms_norm_eps", "tiny"),
        ("llama", "rms_norm_eps", True),
        ("llama", "rms_norm_eps", -1e-5),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "rope_theta", "high"),
        ("llama", "rope_theta", -1.0),
        ("llama", "rope_theta", True),
        ("llama", "original_max_position_embeddings", "32"),
        ("mistral", "sliding_window", "4096"),
        ("mistral", "sliding_window", 0),
        ("mistral", "sliding_window", True),
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_refused_by_name(family: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config field {field}="):
        read(family, **{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["sliding_attention"]},
        {"layer_types": ["sliding_attention", "full_attention", "chunked_attention"]},
        {"layer_types": "full_attention"},
        {"layer_types": 3},
        {"layer_types": [["full_attention"]] * 3},
        {"max_window_layers": "2"},
        {"max_window_layers": -1},
    ],
)
def test_window_layers_that_do_not_fit_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"config field {name}="):
        read("qwen3", sliding_window=16, use_sliding_window=True, **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "fp8"}),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("num_local_experts", 8),
        ("use_mrope", True),
        ("rope_condense_ratio", 4),
        ("rope_interleaved", True),
        ("num_experts", 1),
        ("num_experts", False),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("auto_map", {"AutoModel": "modeling.Model"}),
        ("hidden_act", "gelu"),
        ("a_new_field", 1),
        ("a_new_flag", False),
    ],
)
def test_a_field_that_may_change_the_numbers_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config field {field}=") as caught:
        read(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None},
        {"partial_rotary_factor": 1.0},
        {"a_new_field": None},
        {"use_mrope": False, "rope_interleaved": False, "is_llama_config": True},
        {"neftune_noise_alpha": 5.0, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096, "repetition_penalty": 1.1},
        {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None], "AutoConfig": "configuration.Config"}},
        {"pruned_heads": {}, "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": True},
        {"sliding_window": 2048},
        {"rope_condense_ratio": 1, "use_mla": False, "activation": "swiglu"},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "5.0", "use_cache": True},
    ],
)
def test_fields_without_effect_are_ignored(fields: dict[str, Any]) -> None:
    assert read(**fields) == read()


@pytest.mark.parametrize("name", ["LlamaConfig", "PreTrainedConfig"])
def test_no_default_of_transformers_is_refused(name: str) -> None:
    """What ``to_dict`` of 4.57.1 writes beyond what the file needs; generation's defaults are among it."""
    defaults = {
        "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
        "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
        "diversity_penalty": 0.0,
        "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
        "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"}, "is_decoder": False, "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
        "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
        "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
        "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
        "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
        "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
        "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0,
        "use_bfloat16": False,
    }  # fmt: skip
    extra = {"pretraining_tp": 1, "attention_bias": False, "mlp_bias": False} if name == "LlamaConfig" else {}
    assert read(**defaults, **extra) == read()


def test_quantised_weights_are_refused_with_the_method_and_not_with_every_module() -> None:
    settings = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["self_attn.k_proj"] * 99]}
    with pytest.raises(ConfigError, match="the weights are quantised") as caught:
        read(quantization_config=settings)
    assert "'gptq'" in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(
        ConfigError, match=r"config field quantization=\{'bits': 4\} says that the weights are quantised"
    ):
        read(quantization={"group_size": 64, "bits": 4})


def test_the_name_of_the_first_llama_folders_is_the_same_architecture() -> None:
    assert read(architectures=["LLaMAForCausalLM"]) == read()


def test_a_window_is_refused_for_a_family_that_has_none() -> None:
    with pytest.raises(ConfigError, match="config field sliding_window=16 is not supported for Llama"):
        read(sliding_window=16)


def test_query_heads_that_kv_heads_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads 32 is not a multiple of num_key_value_heads 5"):
        read(num_key_value_heads=5)


@pytest.mark.parametrize(("field", "value"), [("head_dim", 24), ("hidden_size", 255)])
def test_sizes_that_views_cannot_be_cut_from_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} {value} is not supported: it must be "):
        read(**{field: value})


@pytest.mark.parametrize("value", ["int8", "float64", 16])
def test_an_unknown_dtype_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"torch_dtype='{value}' is not supported"):
        read(torch_dtype=value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing: give a Hugging Face folder"), ("{", "cannot be read as JSON"), ("[]", "holds list, expected")],
)
def test_a_config_file_that_is_no_json_object_is_refused_by_path(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_folder_is_read_like_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config("qwen3")))
    assert ModelConfig.from_folder(tmp_path) == read("qwen3")
