"""The prepared checkpoint: buffers in the order in which devices keep them, as an Orbax checkpoint in a model folder.

A folder holds ``fly_jax.json`` (what is stored), ``weights/`` (the Orbax checkpoint) and the model's own config and
tokenizer files. All but replicated vectors are stored as ``max_tp`` row parts: a base shard reads only its own bytes,
and no part in transit is large.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from checkpoints.assemble import allocate, assemble, row_range
from checkpoints.model_folder import read_model
from checkpoints.prepared_info import DTYPES, INFO_FILE, PreparedInfo, prepared_info, write_info
from checkpoints.progress import Progress
from checkpoints.store import read_parts, write_parts
from fly_jax.errors import CheckpointError, ConfigError
from fly_jax.models.sharding import ModelSpec, ParameterSpec, model_spec

WEIGHTS_FOLDER = "weights"

_COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def convert(
    hf_folder: Path,
    out_folder: Path,
    *,
    max_tp: int,
    dtype: np.typing.DTypeLike | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the prepared checkpoint of a Hugging Face folder; it appears under its name only once it is complete.

    Holds one whole replica in host memory. Without ``dtype`` the folder's own is kept. ``progress`` follows the reading
    (bytes done, bytes in all).

    Raises:
        CheckpointError: ``out_folder`` is not empty or cannot be written, or the model's files are missing or damaged.
        ConfigError: ``max_tp``, ``dtype`` or the architecture is not supported.
    """
    hf_folder, out_folder = Path(hf_folder), Path(out_folder)
    _check_arguments(hf_folder, out_folder, max_tp)
    model = read_model(hf_folder)
    dtype = np.dtype(model.dtype if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not supported; supported: {', '.join(DTYPES)}")
    spec = model_spec(model, max_tp, dtype)
    with _appearing(out_folder) as temporary:
        arrays = assemble(hf_folder, spec, progress=progress)
        parts = {key: _parts(spec.buffers[key], array, max_tp) for key, array in arrays.items()}
        write_parts(temporary / WEIGHTS_FOLDER, parts)
        for file in _COPIED_FILES:
            if (hf_folder / file).is_file():
                shutil.copyfile(hf_folder / file, temporary / file)
        shapes = {key: array.shape for key, array in arrays.items()}
        write_info(temporary, PreparedInfo(max_tp, dtype.name, shapes, _weight_files(temporary)))


def restore(
    folder: Path, spec: ModelSpec, *, base_shard: tuple[int, int] = (0, 1), progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Reads a prepared folder; see :func:`checkpoints.prepare.load_weights`."""
    info, max_tp = prepared_info(folder), spec.partition.max_tp
    if info is None:
        raise CheckpointError(f"{folder / INFO_FILE} is missing: give a folder made by fly-jax convert")
    if info.max_tp != max_tp:
        raise CheckpointError(f"{folder} is prepared for max_tp {info.max_tp}, asked for {max_tp}: run fly-jax convert")
    _check_files(folder, info)
    _check_shapes(folder, info, spec)
    arrays = allocate(spec, base_shard)
    targets = {
        name: _parts(buffer, arrays[name], max_tp, row_range(buffer, base_shard)[0])
        for name, buffer in spec.buffers.items()
    }
    read_parts(folder / WEIGHTS_FOLDER, targets, progress)
    return arrays


def _check_arguments(hf_folder: Path, out_folder: Path, max_tp: int) -> None:
    if max_tp < 1 or max_tp & (max_tp - 1):
        raise ConfigError(f"max_tp {max_tp} is not a power of two")
    if (hf_folder / INFO_FILE).exists():
        raise CheckpointError(f"{hf_folder} is prepared already: give the Hugging Face folder that it came from")
    if out_folder.exists() and (not out_folder.is_dir() or any(out_folder.iterdir())):
        raise CheckpointError(f"{out_folder} is not an empty folder: give a new one")


def _check_files(folder: Path, info: PreparedInfo) -> None:
    """Finds truncated files up front: Orbax would report them late, and from several threads at once."""
    actual = _weight_files(folder)
    for file, size in info.files.items():
        if file not in actual:
            raise CheckpointError(f"{folder / file} is missing: copy it again or run fly-jax convert again")
        if actual[file] != size:
            raise CheckpointError(
                f"{folder / file} is damaged: it should have {size} bytes, it has {actual[file]}: "
                "copy it again or run fly-jax convert again"
            )


def _weight_files(folder: Path) -> dict[str, int]:
    files = sorted(path for path in (folder / WEIGHTS_FOLDER).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_shapes(folder: Path, info: PreparedInfo, spec: ModelSpec) -> None:
    """Compares the stored buffers with those of the model; a buffer that only one side has counts as a difference."""
    buffers = spec.buffers
    for name in sorted(info.shapes.keys() | buffers.keys()):
        expected, stored = buffers[name].shape if name in buffers else None, info.shapes.get(name)
        if stored != expected:
            raise CheckpointError(
                f"{folder}: buffer {name} has shape {stored}, config.json says {expected}: run fly-jax convert again"
            )


def _parts(buffer: ParameterSpec, array: np.ndarray, max_tp: int, start: int = 0) -> dict[int, np.ndarray]:
    """Views of ``array``, which holds the buffer's rows from ``start``, by their part's number."""
    whole = buffer.shape[0]
    rows = whole // max_tp if buffer.sharded or len(buffer.shape) > 1 else whole
    return {(start + row) // rows: array[row : row + rows] for row in range(0, array.shape[0], rows)}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name if the block succeeds and is removed otherwise.

    Raises:
        CheckpointError: the operating system refuses to make, fill or rename it.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's own is private
        temporary.replace(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder} cannot be written ({error}): give another folder") from error
        raise
