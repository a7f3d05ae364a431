"""Sampling defaults of a model's folder. Expected values: what vLLM's get_diff_sampling_param takes from such files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoints import convert
from fly_jax.engine.plan import plan_engine
from fly_jax.errors import ConfigError
from fly_jax.models.generation_config import read_sampling_defaults
from fly_jax.sampling_params import SamplingDefaults, SamplingParams
from tests.support import small_config
from tests.tiny_models import CASES, write_model

# As published with Qwen2.5-7B-Instruct.
QWEN = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
QWEN_DEFAULTS = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)


def folder(path: Path, generation: dict[str, Any] | None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def read(
    path: Path, generation: dict[str, Any] | None = None, choice: str = "auto", **override: Any
) -> SamplingDefaults:
    return read_sampling_defaults(choice, override, folder(path, generation))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (QWEN, QWEN_DEFAULTS),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, SamplingDefaults(temperature=0.6, top_p=0.9)),
        ({"temperature": 0.9, "top_p": 0.6}, SamplingDefaults(temperature=0.9, top_p=0.6)),  # Vicuna, without do_sample
        ({"do_sample": False}, SamplingDefaults()),
        ({"do_sample": False, "temperature": None, "top_k": None}, SamplingDefaults()),
        ({"min_p": 0.05, "top_k": 50}, SamplingDefaults(min_p=0.05, top_k=50)),
        ({"max_new_tokens": 2048}, SamplingDefaults(max_tokens=2048)),
        ({"max_length": 4096}, SamplingDefaults()),
    ],
)
def test_sampling_values_become_defaults(
    tmp_path: Path, generation: dict[str, Any], expected: SamplingDefaults
) -> None:
    assert read(tmp_path, generation) == expected


def test_vllm_takes_nothing_from_the_file_and_another_folder_takes_its_place(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", QWEN)
    other = folder(tmp_path / "other", {"temperature": 0.3})
    assert read_sampling_defaults("vllm", {}, model) == SamplingDefaults()
    assert read_sampling_defaults(str(other), {}, model) == SamplingDefaults(temperature=0.3)
    with pytest.raises(ConfigError, match=r"generation_config.json is missing: give auto, vllm or its folder"):
        read_sampling_defaults(str(tmp_path / "none"), {}, model)


@pytest.mark.parametrize("choice", ["auto", "vllm"])
def test_single_values_can_be_overridden(tmp_path: Path, choice: str) -> None:
    expected = QWEN_DEFAULTS if choice == "auto" else SamplingDefaults()
    found = read(tmp_path, QWEN, choice, temperature=0.0, max_new_tokens=9)
    assert (found.temperature, found.max_tokens) == (0.0, 9)
    assert (found.top_k, found.top_p) == (expected.top_k, expected.top_p)


def test_what_is_not_applied_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot set 'repetition_penalty': it can set temperature, top_k, top_p"):
        read(tmp_path, QWEN, repetition_penalty=1.2)


def test_without_the_file_config_json_speaks_but_not_with_what_transformers_left_there(tmp_path: Path) -> None:
    left = folder(tmp_path, None, temperature=1.0, top_k=50, top_p=1.0, do_sample=False)
    assert read_sampling_defaults("auto", {}, left) == SamplingDefaults()
    chosen = folder(tmp_path, None, temperature=0.6, top_k=50, top_p=0.9)
    assert read_sampling_defaults("auto", {}, chosen) == SamplingDefaults(temperature=0.6, top_p=0.9)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("temperature", True), ("top_p", 0), ("top_k", 2.5), ("min_p", "0.1")]
)
def test_a_value_out_of_range_is_refused_with_the_file(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"generation_config.json: {field} must be .*--generation-config vllm"
    ) as caught:
        read(tmp_path, {field: value})
    assert str(tmp_path) in str(caught.value)


def test_one_line_says_what_is_taken_and_what_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fly_jax")
    read(tmp_path, QWEN)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "temperature=0.7, top_p=0.8, top_k=20; not applied: repetition_penalty=1.05 (" in record.message
    caplog.clear()
    read(tmp_path, {"temperature": 0.6, "repetition_penalty": 1.0, "bad_words_ids": [], "num_beams": 1})
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "not applied" not in record.message
    caplog.clear()
    read(tmp_path, {"do_sample": False, "eos_token_id": 2})
    assert not caplog.records


@pytest.mark.parametrize(
    ("cap", "asked", "granted"), [(None, None, None), (None, 5, 5), (9, None, 9), (9, 5, 5), (9, 16, 9)]
)
def test_the_most_new_tokens_bound_every_request(cap: int | None, asked: int | None, granted: int | None) -> None:
    """As in vLLM, where max_new_tokens of this file limits the whole server."""
    assert SamplingDefaults(max_tokens=cap).capped(asked) == granted


def test_parameters_made_of_defaults_are_those_of_an_empty_request() -> None:
    assert SamplingDefaults().params() == SamplingParams()
    assert QWEN_DEFAULTS.params() == SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
    assert SamplingDefaults(max_tokens=9).params().max_tokens == 9


def test_the_plan_of_a_folder_and_of_its_conversion_have_its_defaults(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", CASES["llama_mha"])
    path = tmp_path / "hf" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_k": 20, "eos_token_id": 5}))
    convert(tmp_path / "hf", tmp_path / "prepared", max_tp=4, dtype="float32")
    for made in ("hf", "prepared"):
        plan = plan_engine(small_config(tmp_path / made))
        assert plan.sampling_defaults == SamplingDefaults(temperature=0.7, top_k=20)
    other = folder(tmp_path / "other", {"temperature": 0.1, "eos_token_id": 6})
    plan = plan_engine(small_config(tmp_path / "hf", generation_config=str(other)))
    assert plan.sampling_defaults == SamplingDefaults(temperature=0.1)
    assert 6 in plan.eos_token_ids
    assert 5 not in plan.eos_token_ids
