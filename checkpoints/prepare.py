"""Weights of a model folder as prepared host buffers, whatever the folder holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoints.assemble import assemble
from checkpoints.prepared import restore
from checkpoints.prepared_info import prepared_info
from checkpoints.progress import Progress
from fly_jax.models.sharding import ModelSpec


def load_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: np.typing.DTypeLike,
    *,
    base_shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Loads every buffer of ``spec.buffers``, or one base shard of them.

    Args:
        folder: a Hugging Face folder with safetensors weights, or one that ``fly-jax convert`` wrote.
        spec: the model at the ``max_tp`` of the engine, or of the prepared checkpoint where the folder is one.
        dtype: the one that ``spec`` was made with; weights of another float type are converted.
        base_shard: ``(s, m)``: of sharded buffers, only the rows ``[s/m, (s+1)/m)``. Replicated ones are whole.
        progress: called with the bytes done and the bytes in all.

    Returns:
        C-contiguous arrays by buffer name, each starting at a multiple of 64 bytes.

    Raises:
        CheckpointError: files that are missing, damaged, or do not match config.json.
        ValueError: ``spec`` was made with another dtype, or ``base_shard`` does not divide ``max_tp``.
    """
    index, count = base_shard
    if not 0 <= index < count or spec.partition.max_tp % count:
        raise ValueError(f"base_shard {base_shard} does not divide max_tp {spec.partition.max_tp}")
    if (made_with := spec.buffers["embedding"].dtype) != np.dtype(dtype):
        raise ValueError(f"spec was made with dtype {np.dtype(made_with)}, asked for {np.dtype(dtype)}")
    folder = Path(folder)
    load = assemble if prepared_info(folder) is None else restore
    return load(folder, spec, base_shard=base_shard, progress=progress)
