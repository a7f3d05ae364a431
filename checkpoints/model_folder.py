"""What a folder is, before anything large of it is read: which format, and whether its head is its embedding table."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from checkpoints.prepared_info import INFO_FILE, prepared_info
from checkpoints.source import EMBEDDING, HEAD, TensorFolder
from fly_jax.errors import CheckpointError
from fly_jax.models.config import ModelConfig

_ADAPTER = "adapter_config.json"
_CHUNK_BYTES = 1 << 24  # of a table at a time, so that two that differ early are told apart at once

_log = logging.getLogger(__name__)


def read_model(folder: Path) -> ModelConfig:
    """The model of a folder: its config.json, corrected by what its files hold.

    Where config.json ties the head to the embedding table and the files hold another head, the files are right and
    the log says so: transformers 5 and the model's training agree with them, transformers 4 and vLLM drop the head.

    Raises:
        CheckpointError: no model of a format that can be read, or one without a head that config.json promises.
        ConfigError: an architecture or field that is not supported.
    """
    refuse_other_formats(folder)
    config = ModelConfig.from_folder(folder)
    info = prepared_info(folder)
    if info is not None:
        has_own_head = "lm_head.weight" in info.shapes
        return replace(config, tie_embeddings=config.tie_embeddings and not has_own_head)
    tensors = TensorFolder(folder)
    if not config.tie_embeddings and HEAD not in tensors:
        raise CheckpointError(
            f"{folder} has no tensor {HEAD}, and tie_word_embeddings is not true in its config.json: set it if the "
            "model's head is its embedding table, or fetch the missing file"
        )
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors and _differ(tensors):
        _log.warning(
            "%s: config.json says tie_word_embeddings: true, but %s differs from %s: the file's own head is used",
            folder, HEAD, EMBEDDING,
        )  # fmt: skip
        return replace(config, tie_embeddings=False)
    return config


def refuse_other_formats(folder: Path) -> None:
    """Refuses what is no folder of safetensors weights, and says what it is.

    Raises:
        CheckpointError: a file, or a folder of another kind.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(_gguf(folder))
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that it is in")
    if not folder.is_dir():
        raise CheckpointError(
            f"model folder {folder} does not exist, and nothing is downloaded: give a Hugging Face folder or one made "
            "by fly-jax convert"
        )
    if (folder / INFO_FILE).exists() or _has_weights(folder):
        return
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter of {_base_model(folder)}: merge it into that model and give the merged folder"
        )
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has the makers' own format (params.json): give the folder that is published in Hugging Face's"
        )
    if files := sorted(folder.glob("*.gguf")):
        raise CheckpointError(_gguf(files[0]))


def _has_weights(folder: Path) -> bool:
    return any(not file.name.startswith(("adapter_", "consolidated")) for file in folder.glob("*.safetensors"))


def _gguf(file: Path) -> str:
    return f"{file} is a GGUF file, which is not supported: give the folder of safetensors that it was made from"


def _base_model(folder: Path) -> str:
    try:
        name = json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None  # a damaged file still tells what the folder is
    return str(name) if name else "another model"


def _differ(tensors: TensorFolder) -> bool:
    table, head = tensors.read(EMBEDDING), tensors.read(HEAD)
    if table.shape != head.shape:
        return True
    rows = max(1, _CHUNK_BYTES // max(1, table[:1].nbytes))
    return any(
        not _equal(table[start : start + rows], head[start : start + rows]) for start in range(0, len(table), rows)
    )


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    """By bits where the types are the same, else by value."""
    if left.dtype == right.dtype:
        bits = np.dtype(f"u{left.dtype.itemsize}")
        return np.array_equal(left.view(bits), right.view(bits))
    return np.array_equal(left.astype(np.float32), right.astype(np.float32))
