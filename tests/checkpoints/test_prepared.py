"""The prepared checkpoint: a round trip through Orbax, the files beside it, and damaged or half-written folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints import prepared
from checkpoints.memory import ALIGNMENT
from checkpoints.prepared import convert
from checkpoints.prepared_info import PreparedInfo, prepared_info
from fly_jax.errors import CheckpointError, ConfigError
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import model_spec
from tests.checkpoints.models import ORDER_CASES, load, make
from tests.checkpoints.test_prepare import expect_error
from tests.tiny_models import CASES, Config

CASE = ORDER_CASES["odd_ffn_and_vocabulary"]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [CASE, CASES["llama_vocab_323_tied"], CASES["qwen3"]], ids=["biases", "tied", "qwen3"])
def test_round_trip_is_bitwise(tmp_path: Path, case: Config, dtype: str) -> None:
    spec = make(tmp_path / "hf", case, dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "out", max_tp=4, dtype=np.dtype(dtype))
    direct, restored = load(tmp_path / "hf", spec), load(tmp_path / "out", spec)
    assert direct.keys() == restored.keys()
    for name, array in restored.items():
        assert same_bits(array, direct[name]), name
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A Hugging Face folder and its prepared form at ``max_tp`` 4 in float32."""
    make(tmp_path / "hf", CASE)
    convert(tmp_path / "hf", tmp_path / "out", max_tp=4, dtype=np.float32)
    return tmp_path / "hf", tmp_path / "out"


def test_a_target_that_cannot_be_made_or_filled_is_one_line(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="out cannot be written"):
        convert(folders[0], tmp_path / "file" / "out", max_tp=4, dtype=np.float32)
    monkeypatch.setattr(prepared.shutil, "copyfile", full_disk)
    with pytest.raises(CheckpointError, match=r"new cannot be written .*No space left"):
        convert(folders[0], tmp_path / "new", max_tp=4, dtype=np.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf", "out"]


def test_base_shards_and_another_dtype(folders: tuple[Path, Path]) -> None:
    hf, out = folders
    spec = model_spec(ModelConfig.from_folder(out), 4, np.dtype(ml_dtypes.bfloat16))
    for shard in ((0, 2), (1, 2), (3, 4)):
        direct = load(hf, spec, base_shard=shard)
        for name, array in load(out, spec, base_shard=shard).items():
            assert same_bits(array, direct[name]), name


def test_folder_is_complete(folders: tuple[Path, Path]) -> None:
    hf, out = folders
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert not list(out.rglob("*.safetensors"))
    spec = model_spec(ModelConfig.from_folder(out), 4, np.dtype("float32"))
    shapes = {name: buffer.shape for name, buffer in spec.buffers.items()}
    info = prepared_info(out)
    assert info == PreparedInfo(max_tp=4, dtype="float32", shapes=shapes, files=info.files if info else {})
    assert info is not None
    assert sum(info.files.values()) >= sum(buffer.nbytes for buffer in spec.buffers.values())
    assert prepared_info(hf) is None
    assert [path.name for path in sorted(out.parent.iterdir())] == ["hf", "out"]


def test_progress(folders: tuple[Path, Path]) -> None:
    _, out = folders
    spec, seen = model_spec(ModelConfig.from_folder(out), 4, np.dtype("float32")), []
    arrays = load(out, spec, progress=lambda done, total: seen.append((done, total)))
    total = sum(array.nbytes for array in arrays.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    make(tmp_path / "hf", CASE)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "hf", tmp_path / "out", max_tp=1, dtype=np.float32)
    assert prepared_info(tmp_path / "out") is not None


def test_refused_before_anything_is_written(folders: tuple[Path, Path]) -> None:
    hf, out = folders
    expect_error(lambda: convert(hf, out, max_tp=4, dtype=np.float32), str(out), "not an empty folder")
    expect_error(lambda: convert(out, out.parent / "x", max_tp=4, dtype=np.float32), str(out), "prepared already")
    expect_error(lambda: convert(out.parent / "typo", out.parent / "x", max_tp=4, dtype=np.float32), "typo")
    with pytest.raises(ConfigError, match="max_tp 3 is not a power of two"):
        convert(hf, out.parent / "x", max_tp=3, dtype=np.float32)
    with pytest.raises(ConfigError, match="dtype float64"):
        convert(hf, out.parent / "x", max_tp=4, dtype=np.float64)
    assert [path.name for path in sorted(out.parent.iterdir())] == ["hf", "out"]


def test_interrupted_convert_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf", CASE)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "write_info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", max_tp=1, dtype=np.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_unwritable_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf", CASE)

    def full(*_: object, **__: object) -> None:
        raise ValueError("No space left on device\nand a second line")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointer.save", full)
    expect_error(lambda: convert(tmp_path / "hf", tmp_path / "out", max_tp=1, dtype=np.float32), "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def edit_info(folder: Path, change: Callable[[Config], object]) -> None:
    info = json.loads((folder / "fly_jax.json").read_text())
    change(info)
    (folder / "fly_jax.json").write_text(json.dumps(info))


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 300}))


def manifest(folder: Path) -> Path:
    return folder / "weights" / "manifest.ocdbt"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def scramble(path: Path) -> None:
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "newer format": (lambda f: edit_info(f, lambda i: i.update(format_version=2)), ("version 2", "convert")),
    "no max_tp": (lambda f: edit_info(f, lambda i: i.pop("max_tp")), ("fly_jax.json", "max_tp")),
    "bad dtype": (lambda f: edit_info(f, lambda i: i.update(dtype="int8")), ("fly_jax.json", "int8")),
    "bad shapes": (lambda f: edit_info(f, lambda i: i.update(buffers=[1])), ("fly_jax.json", "damaged")),
    "info is not JSON": (lambda f: (f / "fly_jax.json").write_text("x"), ("fly_jax.json", "JSON")),
    "other config": (edit_config, ("mlp.down", "(128, 64)", "(320, 64)", "config.json")),
    "no files": (lambda f: edit_info(f, lambda i: i.pop("files")), ("fly_jax.json", "files")),
    "truncated weights": (lambda f: cut(manifest(f)), ("manifest.ocdbt", "damaged", "should have", "bytes")),
    "missing file": (lambda f: manifest(f).unlink(), ("manifest.ocdbt", "missing")),
    "scrambled file": (lambda f: scramble(manifest(f)), ("weights", "cannot be restored")),
}


# Orbax closes its event loop while tensorstore still reads other parts, whose results then find it closed.
READS_GO_ON = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@READS_GO_ON
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_one_clear_line(folders: tuple[Path, Path], name: str) -> None:
    _, out = folders
    damage, words = DAMAGE[name]
    damage(out)
    spec = model_spec(ModelConfig.from_folder(out), 4, np.dtype("float32"))
    expect_error(lambda: load(out, spec), *words)


@READS_GO_ON
def test_stored_part_of_another_shape(folders: tuple[Path, Path]) -> None:
    """fly_jax.json and the weights come from two conversions."""
    hf, out = folders
    other = out.parent / "other"
    convert(hf, other, max_tp=8, dtype=np.float32)
    edit_info(
        other, lambda info: info.update(max_tp=4, buffers=json.loads((out / "fly_jax.json").read_text())["buffers"])
    )
    spec = model_spec(ModelConfig.from_folder(other), 4, np.dtype("float32"))
    expect_error(lambda: load(other, spec), "part", "expected")


def test_max_tp_of_the_spec_must_be_the_checkpoints(folders: tuple[Path, Path]) -> None:
    _, out = folders
    spec = model_spec(ModelConfig.from_folder(out), 8, np.dtype("float32"))
    with pytest.raises(CheckpointError, match="prepared for max_tp 4, asked for 8"):
        load(out, spec)
