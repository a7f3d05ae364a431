"""What folders are: other formats are named, and files win over what config.json says of the head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import convert, load_weights, prepared_info, read_model
from checkpoints.model_folder import refuse_other_formats
from fly_jax.engine.plan import plan_engine, weight_bytes
from fly_jax.errors import CheckpointError
from fly_jax.models.sharding import model_spec
from tests.checkpoints.models import tensors
from tests.support import small_config, small_llm
from tests.tiny_models import CASES, parameters, random_token_ids, write_model

TIED = CASES["llama_gqa_tied"]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = random_token_ids(8, TIED["vocab_size"])
# transformers 5.24.0. 4.57.1 drops the head and gives the second line for both, as vLLM would.
OWN_HEAD = [-5.391416, -6.197845, -6.207196, -10.197710, -8.462521, -6.994808, -9.007419]
SHARED_TABLE = [-9.888545, -8.726132, -8.244047, -8.532793, -8.090049, -9.909514, -8.823620]


def write_tied(folder: Path, *, head: str = "own", **changes: Any) -> Path:
    """A tied model whose file also holds a head: its ``own``, an ``equal`` one, or ``only`` that and no table."""
    write_model(folder, TIED | changes)
    stored = tensors(folder)
    own = parameters(TIED | {"tie_word_embeddings": False})[HEAD]
    stored[HEAD] = own if head == "own" else stored[TABLE].copy()
    if head == "only":
        del stored[TABLE]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scores(folder: Path, **options: Any) -> np.ndarray:
    with small_llm(folder, layouts=("2+2",), **options) as llm:
        return llm.score(PROMPT)


@pytest.mark.slow
def test_a_head_of_its_own_is_used_although_config_json_ties_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tied(tmp_path / "hf")
    np.testing.assert_allclose(scores(folder), OWN_HEAD, atol=2e-4)
    (record,) = [record for record in caplog.records if "the file's own head is used" in record.message]
    assert record.levelno == logging.WARNING
    assert f"{HEAD} differs from {TABLE}" in record.message


@pytest.mark.slow
def test_a_converted_folder_keeps_the_head_and_the_memory_plan_counts_it(tmp_path: Path) -> None:
    folder = write_tied(tmp_path / "hf")
    convert(folder, tmp_path / "prepared", max_tp=4, dtype="float32")
    info = prepared_info(tmp_path / "prepared")
    assert info is not None
    assert "lm_head.weight" in info.shapes
    np.testing.assert_allclose(scores(tmp_path / "prepared"), OWN_HEAD, atol=2e-4)
    write_model(tmp_path / "tied", TIED)
    plans = [plan_engine(small_config(tmp_path / name)) for name in ("hf", "prepared", "tied")]
    own, prepared, tied = (weight_bytes(plan.shapes.model, 1) for plan in plans)
    assert own == prepared == tied + TIED["vocab_size"] * TIED["hidden_size"] * 4


def test_dummy_weights_follow_config_json_alone(tmp_path: Path) -> None:
    plan = plan_engine(small_config(write_tied(tmp_path), load_format="dummy"))
    assert plan.model_config.tie_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("head", ["equal", "only"])
def test_one_table_under_either_name_stays_one_table(
    tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tied(tmp_path, head=head)
    assert read_model(folder).tie_embeddings
    assert not caplog.records
    np.testing.assert_allclose(scores(folder), SHARED_TABLE, atol=2e-4)


@pytest.mark.parametrize(("change", "equal"), [(0.0, True), (1.0, False)])
def test_tables_of_different_types_are_compared_by_value(tmp_path: Path, change: float, equal: bool) -> None:
    write_model(tmp_path, TIED, dtype="float16")
    stored = tensors(tmp_path)
    stored[HEAD] = stored[TABLE].astype(np.float32)
    stored[HEAD][-1, -1] += change
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_model(tmp_path).tie_embeddings is equal


def test_a_head_that_ends_elsewhere_is_refused_by_its_shape(tmp_path: Path) -> None:
    write_model(tmp_path, TIED)
    stored = tensors(tmp_path)
    stored[HEAD] = stored[TABLE][:-1].copy()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = model_spec(read_model(tmp_path), 4, np.dtype("float32"))
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight has shape \[319, 64\], config.json says \[320"):
        load_weights(tmp_path, spec, "float32")


def test_an_untied_model_without_a_head_is_refused_with_what_to_set(tmp_path: Path) -> None:
    write_model(tmp_path, TIED)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    for action in (lambda: plan_engine(small_config(tmp_path)), lambda: convert(tmp_path, tmp_path / "out", max_tp=4)):
        with pytest.raises(CheckpointError, match=r"has no tensor lm_head.weight, and tie_word_embeddings is not true"):
            action()


def write_files(folder: Path, *names: str, **contents: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps(contents) if name.endswith(".json") else "")
    return folder


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "is a LoRA adapter of Qwen/Qwen2-7B: merge it into that model and give the merged folder",
        ),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter of Qwen/Qwen2-7B"),
        (["llama-2-7b.Q4_K_M.gguf"], "is a GGUF file, which is not supported: give the folder of safetensors"),
        (["config.json", "model.gguf"], "is a GGUF file"),
        (["params.json", "consolidated.safetensors", "tokenizer.model"], r"the makers' own format \(params.json\)"),
        (["params.json", "consolidated.00.pth"], r"the makers' own format \(params.json\)"),
    ],
)
def test_a_folder_of_another_format_is_refused_with_what_it_is(tmp_path: Path, files: list[str], sentence: str) -> None:
    folder = write_files(tmp_path / "model", *files, base_model_name_or_path="Qwen/Qwen2-7B")
    for action in (lambda: plan_engine(small_config(folder)), lambda: convert(folder, tmp_path / "out", max_tp=4)):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_of_pickles_is_refused_with_how_to_save_it(tmp_path: Path, file: str) -> None:
    write_model(tmp_path, TIED)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text("")
    with pytest.raises(CheckpointError, match=f"has no safetensors weights, only {file}: .* with save_pretrained"):
        plan_engine(small_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.gguf", "is a GGUF file"),
        ("model.safetensors", "is a file: give the folder that it is in"),
        ("meta-llama/Llama-2-7b-hf", "does not exist, and nothing is downloaded"),
    ],
)
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    if "/" not in name:
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=sentence):
        refuse_other_formats(tmp_path / name)


def test_an_adapter_beside_whole_weights_does_not_matter(tmp_path: Path) -> None:
    write_model(tmp_path, TIED)
    write_files(tmp_path, "adapter_config.json")
    assert read_model(tmp_path).tie_embeddings
