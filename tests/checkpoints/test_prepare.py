"""Loading Hugging Face folders: types, shards, alignment, progress, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.memory import ALIGNMENT, aligned_empty, copy, copy_transposed
from checkpoints.prepare import load_weights
from fly_jax.errors import CheckpointError
from tests.checkpoints.models import load, make, tensors
from tests.tiny_models import CASES

CASE = CASES["llama_biases"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conversion(tmp_path: Path, stored: str, dtype: str) -> None:
    spec = make(tmp_path, CASE, dtype=stored)
    spec = make(tmp_path / "again", CASE | {"torch_dtype": stored}, dtype=dtype)
    (tmp_path / "again" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    prepared, hf = load(tmp_path / "again", spec), tensors(tmp_path)
    embedding, down = hf["model.embed_tokens.weight"], hf["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(prepared["embedding"][: len(embedding)], embedding.astype(np.dtype(dtype)))
    np.testing.assert_array_equal(prepared["layers.1.mlp.down"][: down.shape[1]], down.T.astype(np.dtype(dtype)))
    bias = prepared["layers.0.attention.qkv_bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias[:16], hf["model.layers.0.self_attn.q_proj.bias"][:16].astype(np.float32))


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    single, several = tmp_path / "single", tmp_path / "several"
    spec = make(single, CASE)
    make(several, CASE, num_shards=3)
    assert not (several / "model.safetensors").exists()
    expected = load(single, spec)
    for name, array in load(several, spec).items():
        np.testing.assert_array_equal(array, expected[name])


def test_arrays_start_at_a_multiple_of_64_bytes_and_own_their_memory(tmp_path: Path) -> None:
    spec = make(tmp_path, CASES["qwen3"], max_tp=8, dtype="bfloat16")
    for name, array in load(tmp_path, spec, base_shard=(1, 2)).items():
        assert array.ctypes.data % ALIGNMENT == 0, name
        assert array.flags.c_contiguous, name
        assert array.flags.writeable, name
        assert array.dtype == spec.buffers[name].dtype
        assert type(array) is np.ndarray


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    spec = make(tmp_path, CASE)
    seen: list[tuple[int, int]] = []
    prepared = load(tmp_path, spec, progress=lambda done, total: seen.append((done, total)))
    total = sum(array.nbytes for array in prepared.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert {t for _, t in seen} == {total}


@pytest.mark.parametrize("base_shard", [(2, 2), (-1, 2), (0, 3), (0, 8)])
def test_impossible_base_shard(tmp_path: Path, base_shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="base_shard"):
        load(tmp_path, make(tmp_path, CASE), base_shard=base_shard)


def test_another_dtype_than_the_spec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made with dtype float32, asked for bfloat16"):
        load_weights(tmp_path, make(tmp_path, CASE), ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 33)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_aligned_empty(shape: tuple[int, ...], dtype: type) -> None:
    array = aligned_empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.ctypes.data % ALIGNMENT == 0


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (257, 128), (129, 1)])
@pytest.mark.parametrize("source_type", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("target_type", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_copies_convert_and_transpose(shape: tuple[int, int], source_type: type, target_type: type) -> None:
    source: np.ndarray = np.random.default_rng(0).standard_normal(shape).astype(source_type)
    plain, transposed = aligned_empty(shape, target_type), aligned_empty(shape[::-1], target_type)
    copy(plain, source)
    copy_transposed(transposed, source)
    np.testing.assert_array_equal(plain, source.astype(target_type))
    np.testing.assert_array_equal(transposed, source.astype(target_type).T)


# What can be wrong with a folder: how to break one, and words that the one-line error must have.

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / WEIGHTS)


def cut(folder: Path, nbytes: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:nbytes])


def add_bytes(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more")


def put_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def integers(held: dict[str, np.ndarray]) -> None:
    held["model.norm.weight"] = held["model.norm.weight"].astype(np.int32)


def narrow(held: dict[str, np.ndarray]) -> None:
    held["model.layers.1.mlp.down_proj.weight"] = np.zeros((64, 95), np.float32)


ENTRY = b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[%d,%d]}}'
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), (WEIGHTS, INDEX)),
    "pickle": (only_pickle, ("pytorch_model.bin", "pickle", "safetensors")),
    "truncated data": (lambda f: cut(f, -100), (WEIGHTS, "truncated", "bytes")),
    "truncated header": (lambda f: cut(f, 100), (WEIGHTS, "truncated", "100")),
    "empty file": (lambda f: cut(f, 0), (WEIGHTS, "0 bytes")),
    "longer than its header says": (add_bytes, (WEIGHTS, "too long")),
    "web page in its place": (lambda f: (f / WEIGHTS).write_text("<!doctype html>" * 9), (WEIGHTS, "not a saf")),
    "header is not JSON": (lambda f: put_header(f, b"{nonsense}"), (WEIGHTS, "header")),
    "header is a list": (lambda f: put_header(f, b"[]"), (WEIGHTS, "header")),
    "header entry without offsets": (lambda f: put_header(f, b'{"x":{"dtype":"F32"}}'), (WEIGHTS, "tensor x")),
    "offsets do not fit the shape": (lambda f: put_header(f, ENTRY % (0, 8), b"12345678"), ("model.norm", "8 bytes")),
    "negative offset": (lambda f: put_header(f, ENTRY % (-256, 0)), ("model.norm", "256 bytes")),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("model.layers.0.mlp.up_proj.bias")),
        ("model.layers.0.mlp.up_proj.bias", "missing", "config.json says [96]"),
    ),
    "wrong shape": (
        lambda f: rewrite(f, narrow),
        ("model.layers.1.mlp.down_proj.weight", "[64, 95]", "config.json says [64, 96]"),
    ),
    "wrong type": (lambda f: rewrite(f, integers), ("model.norm.weight", "I32", "F32")),
    "unexpected tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(4, np.float32)})),
        ("model.layers.2.mlp.up_proj.weight", "config.json"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_one_clear_line(tmp_path: Path, name: str) -> None:
    spec = make(tmp_path, CASE)
    breaks, words = BROKEN[name]
    breaks(tmp_path)
    expect_error(lambda: load(tmp_path, spec), *words)


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    spec = make(tmp_path, CASE)
    size = (tmp_path / WEIGHTS).stat().st_size
    cut(tmp_path, -100)
    expect_error(lambda: load(tmp_path, spec), str(size), str(size - 100))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SECOND = "model-00002-of-00002.safetensors"
BROKEN_INDEX: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing file": (lambda f: (f / SECOND).unlink(), (SECOND, "missing", INDEX)),
    "not JSON": (lambda f: (f / INDEX).write_text("{"), (INDEX, "JSON")),
    "no map": (lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "file elsewhere": (lambda f: edit_index(f, lambda m: m.update(x="../x.safetensors")), (INDEX, "../x.safetensors")),
    "tensor that is in no file": (lambda f: edit_index(f, lambda m: m.update(x=SECOND)), (SECOND, "tensor x")),
    "tensor in another file": (
        lambda f: edit_index(f, lambda m: m.update({"model.embed_tokens.weight": SECOND})),
        ("model.embed_tokens.weight", SECOND, "model-00001-of-00002.safetensors"),
    ),
}


@pytest.mark.parametrize("name", BROKEN_INDEX)
def test_broken_index_is_one_clear_line(tmp_path: Path, name: str) -> None:
    spec = make(tmp_path, CASE, num_shards=2)
    breaks, words = BROKEN_INDEX[name]
    breaks(tmp_path)
    expect_error(lambda: load(tmp_path, spec), *words)


def test_missing_folder(tmp_path: Path) -> None:
    spec = make(tmp_path, CASE)
    expect_error(lambda: load(tmp_path / "typo", spec), "typo", "not a folder")


def test_harmless_leftovers_are_ignored(tmp_path: Path) -> None:
    case = CASES["llama_gqa_tied"]
    spec = make(tmp_path, case)
    expected = load(tmp_path, spec)
    leftovers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "lm_head.weight": np.zeros((320, 64), np.float32),
    }
    rewrite(tmp_path, lambda held: held.update(leftovers))
    for name, array in load(tmp_path, spec).items():
        np.testing.assert_array_equal(array, expected[name])


def expect_error(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
