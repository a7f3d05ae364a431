"""float16 checkpoints are run in float16. Expected values: transformers 5.24.0 and 4.57.1, which agree."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import convert, prepared_info
from fly_jax.engine.plan import plan_engine
from fly_jax.errors import CheckpointError
from tests.checkpoints.models import load, make, tensors
from tests.support import small_config, small_llm
from tests.tiny_models import CASES, random_token_ids, write_model

pytestmark = pytest.mark.slow  # its engines

CASE = CASES["llama_mha"]
PROMPT = random_token_ids(8, CASE["vocab_size"])
FLOAT16 = [-6.140514, -4.386995, -6.500665, -4.549139, -6.370278, -6.890237, -11.191051]
BFLOAT16 = [-6.185532, -4.433040, -6.488805, -4.618813, -6.354569, -6.858186, -11.201144]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "half"
    write_model(folder, CASE, dtype="float16")
    return folder


def score(folder: Path, layout: str, **options: Any) -> tuple[np.ndarray, str]:
    with small_llm(folder, layouts=(layout,), **options) as llm:
        return llm.score(PROMPT), llm._plan.shapes.dtype.name


@pytest.mark.parametrize("layout", ["2+1+1", "4"])
def test_log_probabilities_are_nearer_to_float16_than_bfloat16_is(folder: Path, layout: str) -> None:
    """The two differ by 0.07 in the reference; partial sums of TP groups are rounded in another order."""
    scores, dtype = score(folder, layout, dtype="auto")
    assert dtype == "float16"
    np.testing.assert_allclose(scores, FLOAT16, atol=0.012)
    assert np.abs(np.subtract(BFLOAT16, FLOAT16)).max() > 0.06


def test_a_live_switch_keeps_the_tokens(folder: Path) -> None:
    from fly_jax import SamplingParams

    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with small_llm(folder, layouts=("1+1+1+1", "2+2"), dtype="float16") as llm:
        before = llm.generate([PROMPT], greedy)[0].token_ids
        llm.switch("2+2")
        assert llm.generate([PROMPT], greedy)[0].token_ids == before


def test_the_types_of_weights_and_pool_follow_the_option(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fly_jax")
    for asked, dtype, warned in (
        ("auto", "float16", True),
        ("float16", "float16", True),
        ("bfloat16", "bfloat16", False),
    ):
        caplog.clear()
        shapes = plan_engine(small_config(folder, dtype=asked)).shapes
        assert shapes.dtype == jnp.dtype(dtype)
        assert 2 * shapes.kv.block_bytes == plan_engine(small_config(folder)).shapes.kv.block_bytes
        assert any("float16 on CPU" in record.message for record in caplog.records) is warned


def test_a_converted_folder_keeps_float16(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "prepared", max_tp=4)
    info = prepared_info(tmp_path / "prepared")
    assert info is not None
    assert info.dtype == "float16"
    scores, dtype = score(tmp_path / "prepared", "4", dtype="auto")
    assert dtype == "float16"
    np.testing.assert_allclose(scores, FLOAT16, atol=0.012)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path, stored: str, name: str) -> None:
    spec = make(tmp_path, CASE, dtype="float16")
    weights = {key: value.astype(jnp.dtype(stored)) for key, value in tensors(tmp_path).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path, spec)
    weights[name].reshape(-1)[-1] = 70000.0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit float16, whose largest value is 65,504: use --dtype bfl"):
        load(tmp_path, spec)
