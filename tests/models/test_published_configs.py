"""The configs of published model folders, in the form in which they are published (paths of their makers left out).

``published_configs/index.json`` says which model each is, and what becomes of it: what transformers makes of those that
are read (5.24.0 and 4.57.1 agree), or the sentence with which the others are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import read_model
from fly_jax.errors import CheckpointError, ConfigError
from fly_jax.models.config import ModelConfig
from fly_jax.models.generation_config import read_sampling_defaults
from fly_jax.sampling_params import SamplingDefaults

CONFIGS = Path(__file__).parent / "published_configs"
INDEX: dict[str, dict[str, Any]] = json.loads((CONFIGS / "index.json").read_text())
READ = sorted(name for name, entry in INDEX.items() if "transformers" in entry)
REFUSED = sorted(name for name, entry in INDEX.items() if "refused" in entry)


def raw(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_the_index_names_every_file_and_there_are_many() -> None:
    assert sorted(INDEX) == sorted(path.stem for path in CONFIGS.glob("*.json") if path.name != "index.json")
    assert len(READ) >= 25
    assert len(REFUSED) >= 10


@pytest.mark.parametrize("name", READ)
def test_a_supported_model_is_read_as_transformers_reads_it(name: str) -> None:
    config, expected = ModelConfig.from_hf(raw(name)), INDEX[name]["transformers"]
    assert config.num_kv_heads == expected["num_key_value_heads"]
    assert config.head_dim == expected["head_dim"]
    assert config.max_position_embeddings == expected["max_position_embeddings"]
    assert config.rms_norm_eps == expected["rms_norm_eps"]
    assert config.tie_embeddings == expected["tie_word_embeddings"]
    assert config.dtype == expected["dtype"]
    assert set(config.sliding_windows) == {expected["window"]}
    frequencies = config.rope.inverse_frequencies()
    picked = frequencies[[0, len(frequencies) // 4, len(frequencies) // 2, -1]]
    np.testing.assert_allclose(picked, expected["inverse_frequencies"], rtol=2e-6)
    assert config.rope.attention_scaling() == pytest.approx(expected["attention_scaling"], rel=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_model_is_refused_with_its_sentence(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(raw(name))
    assert INDEX[name]["refused"] in str(caught.value)
    assert "\n" not in str(caught.value)


# Of Qwen2-7B, with its base model's public name in place of a path.
LORA = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen2-7B", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": ["embed_tokens", "up_proj", "gate_proj", "down_proj"],
    "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "files", "sentence"),
    [
        (None, ["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter of Qwen/Qwen2-7B: merge it"),
        (None, ["llama-2-7b.Q4_K_M.gguf", "README.md"], "is a GGUF file, which is not supported"),
        ("codellama-7b", ["pytorch_model-00001-of-00003.bin", "pytorch_model.bin.index.json"], "a pickle file, which"),
        ("llama-3.1-8b-instruct", [], "has no model.safetensors or model.safetensors.index.json"),
    ],
)
def test_a_folder_without_weights_that_can_be_read_is_refused(
    tmp_path: Path, config: str | None, files: list[str], sentence: str
) -> None:
    for file in files:
        (tmp_path / file).write_text(json.dumps(LORA) if file == "adapter_config.json" else "")
    if config is not None:
        (tmp_path / "config.json").write_text((CONFIGS / f"{config}.json").read_text())
    with pytest.raises(CheckpointError, match=sentence):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "published", "expected"),
    [
        (
            "qwen2.5-7b-instruct",
            '{"bos_token_id":151643,"pad_token_id":151643,"do_sample":true,"eos_token_id":[151645,151643],'
            '"repetition_penalty":1.05,"temperature":0.7,"top_p":0.8,"top_k":20,"transformers_version":"4.37.0"}',
            SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
        ),
        (
            "llama-3.2-3b-instruct",
            '{"bos_token_id":128000,"do_sample":true,"eos_token_id":[128001,128008,128009],"temperature":0.6,'
            '"top_p":0.9,"transformers_version":"4.45.0.dev0"}',
            SamplingDefaults(temperature=0.6, top_p=0.9),
        ),
        (
            "qwen3-4b",
            '{"bos_token_id":151643,"do_sample":true,"eos_token_id":[151645,151643],"pad_token_id":151643,'
            '"temperature":0.6,"top_k":20,"top_p":0.95,"transformers_version":"4.51.0"}',
            SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95),
        ),
        (
            "yi-6b-chat",
            '{"bos_token_id":6,"do_sample":true,"eos_token_id":7,"pad_token_id":0,"temperature":0.6,'
            '"max_length":4096,"top_p":0.8,"transformers_version":"4.35.0"}',
            SamplingDefaults(temperature=0.6, top_p=0.8),
        ),
        (
            "deepseek-coder-1.3b-instruct",
            '{"_from_model_config":true,"bos_token_id":32013,"eos_token_id":32021,"transformers_version":"4.34.1"}',
            SamplingDefaults(),
        ),
        ("mistral-7b-instruct-v0.3-dump", None, SamplingDefaults()),
    ],
)
def test_published_sampling_values_become_defaults(
    tmp_path: Path, model: str, published: str | None, expected: SamplingDefaults
) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / f"{model}.json").read_text())
    if published is not None:
        (tmp_path / "generation_config.json").write_text(published)
    assert read_sampling_defaults("auto", {}, tmp_path) == expected
