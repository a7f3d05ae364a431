"""What is decided before a byte of weights is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fly_jax.engine.plan import plan_engine
from fly_jax.errors import ConfigError
from tests.support import small_config
from tests.tiny_models import CASES, EOS_ID, write_model


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("max_positions", "scaling", "context"),
    [
        (128, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),  # as Qwen2.5's
        (512, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (640, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 640),
        (128, {"type": "yarn", "factor": 4.0}, 512),
        (128, {"type": "linear", "factor": 2.0}, 256),
        (128, {"type": "dynamic", "factor": 2.0}, 256),
        (128, None, 128),
    ],
)
def test_the_context_is_what_the_scaling_reaches(
    tmp_path: Path, max_positions: int, scaling: dict[str, Any] | None, context: int
) -> None:
    write_model(tmp_path, CASES["qwen2"] | {"max_position_embeddings": max_positions, "rope_scaling": scaling})
    assert plan_engine(small_config(tmp_path)).max_model_len == context
    assert plan_engine(small_config(tmp_path, max_model_len=context)).max_model_len == context
    with pytest.raises(ConfigError, match=f"max_model_len {context + 1} exceeds the model's own context of {context}"):
        plan_engine(small_config(tmp_path, max_model_len=context + 1))


@pytest.mark.parametrize(("value", "expected"), [(5, {5}), ([5, 7], {5, 7}), ([], set())])
def test_end_of_sequence_tokens_are_one_or_several(tmp_path: Path, value: Any, expected: set[int]) -> None:
    write_model(tmp_path, CASES["llama_mha"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert plan_engine(small_config(tmp_path)).eos_token_ids == expected | {EOS_ID}  # and the tokenizer's


@pytest.mark.parametrize("value", [[[1]], "5", ["5"], 5.0, True, [5, False], {"id": 5}, [None]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_of_sequence_tokens_of_a_wrong_type_are_refused_by_name(tmp_path: Path, file: str, value: Any) -> None:
    write_model(tmp_path, CASES["llama_mha"])
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if file != "config.json":
        (tmp_path / file).write_text("{}")
    edit(tmp_path / file, eos_token_id=value)
    with pytest.raises(ConfigError, match="eos_token_id") as caught:
        plan_engine(small_config(tmp_path))
    assert str(tmp_path / file) in str(caught.value)
    assert "\n" not in str(caught.value)
