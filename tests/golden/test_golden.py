"""Consistency of the stored reference values and of the tiny model folders."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.golden import StaleGoldenError, golden_cases, load_golden
from tests.tiny_models import (
    BOS_ID,
    CASES,
    EOS_ID,
    IM_END_ID,
    fingerprint,
    modern_spelling,
    parameter_shapes,
    parameters,
    write_model,
)


@pytest.mark.parametrize("case", CASES)
def test_golden_is_fresh_and_complete(case: str) -> None:
    golden = load_golden(case)
    vocab_size = CASES[case]["vocab_size"]
    assert len(golden.prompts) == 2
    assert len(golden.greedy) == 12
    for prompt in golden.prompts:
        length = len(prompt.token_ids)
        assert prompt.rope_length == length
        assert prompt.logprobs.shape == (length - 1,)
        assert prompt.top1.shape == prompt.top1_margins.shape == (length,)
        assert np.isfinite(prompt.logprobs).all()
        assert (prompt.logprobs < 0).all()
        assert 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size


def test_stored_cases_are_the_declared_ones() -> None:
    assert golden_cases() == list(CASES)


def test_changed_case_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "qwen2", CASES["qwen2"] | {"rope_theta": 9999.0})
    with pytest.raises(StaleGoldenError, match="stale"):
        load_golden("qwen2")
    monkeypatch.setitem(CASES, "unknown", CASES["qwen3"])
    with pytest.raises(StaleGoldenError, match="missing"):
        load_golden("unknown")


def test_parameters_depend_on_seed_and_name_only() -> None:
    config = CASES["llama_biases"]
    first, second = parameters(config), parameters(config | {"rope_theta": 5.0, "vocab_size": 330})
    for name, value in first.items():
        if value.shape == second[name].shape:
            np.testing.assert_array_equal(value, second[name])
    assert fingerprint(config) == fingerprint(dict(reversed(config.items())))
    assert fingerprint(config) != fingerprint(config, seed=1)


def test_modern_spelling() -> None:
    config = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_size": 64}
    assert modern_spelling(config) == {
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    assert modern_spelling({})["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_sharded_folder_holds_the_same_tensors(tmp_path: Path) -> None:
    config = CASES["qwen3"]
    write_model(tmp_path / "single", config)
    write_model(tmp_path / "sharded", config, num_shards=3)
    single = load_file(tmp_path / "single" / "model.safetensors")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == single.keys() == parameter_shapes(config).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in single.values())
    assert len(set(index["weight_map"].values())) == 3
    for name, file_name in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file_name, framework="np") as file:
            np.testing.assert_array_equal(file.get_tensor(name), single[name])


def test_bfloat16_folder(tmp_path: Path) -> None:
    config = CASES["llama_gqa_tied"]
    write_model(tmp_path, config, dtype="bfloat16")
    data = (tmp_path / "model.safetensors").read_bytes()
    header_length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_length])
    entry = header["model.norm.weight"]
    start, end = (8 + header_length + offset for offset in entry["data_offsets"])
    stored = np.frombuffer(data[start:end], dtype=ml_dtypes.bfloat16)
    assert entry["dtype"] == "BF16"
    np.testing.assert_array_equal(stored, parameters(config)["model.norm.weight"].astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["llama_mha", "qwen3", "llama_vocab_323"])
def test_tokenizer_folder(case: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    write_model(tmp_path, CASES[case])
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "the other thing: é 🙂 naïve"
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    special = [BOS_ID] if CASES[case]["model_type"] == "llama" else []
    assert tokenizer.encode(text).ids == special + plain
    assert tokenizer.decode(plain) == text
    assert len(plain) < len(text.encode())
    assert max(tokenizer.get_vocab().values()) < CASES[case]["vocab_size"]
    assert tokenizer.token_to_id("<|bos|>") == BOS_ID
    assert tokenizer.encode("<|eos|><|im_end|>", add_special_tokens=False).ids == [EOS_ID, IM_END_ID]
