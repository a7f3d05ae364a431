"""Reads the tensors of a Hugging Face folder's safetensors files by memory map.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header, the data).
The header is read here rather than by the library because a tensor is wanted as a view of the mapped file, never
as a copy, and because a damaged file must be reported with the sizes that show the damage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fly_jax.errors import CheckpointError
from fly_jax.host.json_files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_REFETCH = "download the file again"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: ``offset`` is in bytes from the start of ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFolder:
    """The tensors of one folder by name, checked against the files' lengths before any of them is read."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers only.

        Raises:
            CheckpointError: no safetensors files, or one that is missing, truncated or malformed.
        """
        self.folder = folder
        self._tensors = _folder_tensors(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def share_table(self) -> None:
        """For a tied model: where the file holds the shared table as the head only, it is the embedding's too."""
        if HEAD in self._tensors:
            self._tensors.setdefault(EMBEDDING, self._tensors[HEAD])

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Compares names and shapes with what the model needs.

        Args:
            ignored: names that may be present without being read.

        Raises:
            CheckpointError: names the first tensor that is missing, unexpected, or of the wrong shape or type.
        """
        for name, shape in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing; config.json says {list(shape)}")
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, config.json says {list(shape)}: "
                    "use the config.json that belongs to these weights"
                )
            if tensor.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name} has type {tensor.dtype}, supported are {', '.join(_DTYPES)}"
                )
        for name in self._tensors.keys() - expected.keys() - set(ignored):
            raise CheckpointError(
                f"{self._tensors[name].path}: tensor {name} is not part of the model that config.json describes"
            )

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the file; its pages are unmapped when the last view of it is gone."""
        tensor = self._tensors[name]
        return np.memmap(tensor.path, _DTYPES[tensor.dtype], mode="r", offset=tensor.offset, shape=tensor.shape)


def _folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The single file where there is one, else the index: transformers' order."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give a Hugging Face folder or one made by fly-jax convert")
    if (folder / SINGLE_FILE).is_file():
        return _file_tensors(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _indexed_tensors(folder)
    pickles = sorted((*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise CheckpointError(
            f"{folder} has no safetensors weights, only {pickles[0].name}: that is a pickle file, which is never read "
            "because it can run code: load it with transformers and save it with save_pretrained"
        )
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} or {INDEX_FILE}: give a folder with safetensors weights")


def _indexed_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the files that the index names; a name that lies in another file than it says is an error."""
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: {_REFETCH}")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file beside it")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing, {INDEX_FILE} names it: {_REFETCH}")
        for name, tensor in _file_tensors(folder / file).items():
            if weight_map.get(name, file) != file:
                raise CheckpointError(f"{index} says that tensor {name} is in {weight_map[name]}, it is in {file}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file} has no tensor {name}, {INDEX_FILE} says it has: {_REFETCH}")
    return tensors


def _file_tensors(path: Path) -> dict[str, Tensor]:
    header, data_start = _read_header(path)
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    end = max((data_start + entry["data_offsets"][1] for name, entry in header.items() if name in tensors), default=8)
    actual = path.stat().st_size
    if tensors and actual != end:
        state = "truncated" if actual < end else "too long"
        raise CheckpointError(f"{path} is {state}: its header says {end} bytes, it has {actual}: {_REFETCH}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset in the file at which the data start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file ({size} bytes): {_REFETCH}")
        if size < 8 + length:
            raise CheckpointError(
                f"{path} is truncated: its header alone takes {8 + length} bytes, it has {size}: {_REFETCH}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has no readable safetensors header ({error}): {_REFETCH}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has no readable safetensors header: {_REFETCH}")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    """One header entry; its byte range must be as long as its shape and type say (types not read are not checked)."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a malformed header entry for tensor {name}: {_REFETCH}") from error
    expected = math.prod(shape) * _DTYPES[dtype].itemsize if dtype in _DTYPES else end - begin
    if begin < 0 or min(shape, default=1) < 0 or end - begin != expected:
        raise CheckpointError(f"{path}: tensor {name} {dtype} {list(shape)} cannot be {end - begin} bytes: {_REFETCH}")
    return Tensor(path, dtype, shape, data_start + begin)
