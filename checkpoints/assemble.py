"""Fills prepared buffers from a Hugging Face folder, each written once and in place."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoints.memory import aligned_empty, copy, copy_transposed
from checkpoints.plan import BufferPlan, ignored_tensors, plan, tensor_shapes
from checkpoints.progress import Progress
from checkpoints.source import TensorFolder
from fly_jax.models.sharding import ModelSpec, ParameterSpec

_MAX_THREADS = 8


def row_range(buffer: ParameterSpec, base_shard: tuple[int, int]) -> tuple[int, int]:
    """The rows ``[start, stop)`` of a buffer that shard ``s`` of ``m`` holds; all of them where it is replicated."""
    index, count = base_shard
    rows = buffer.shape[0]
    if not buffer.sharded:
        return 0, rows
    return index * rows // count, (index + 1) * rows // count


def allocate(spec: ModelSpec, base_shard: tuple[int, int]) -> dict[str, np.ndarray]:
    """Uninitialised arrays for the rows of every buffer that a base shard holds, by name."""
    arrays = {}
    for name, buffer in spec.buffers.items():
        start, stop = row_range(buffer, base_shard)
        arrays[name] = aligned_empty((stop - start, *buffer.shape[1:]), buffer.dtype)
    return arrays


def assemble(
    folder: Path, spec: ModelSpec, *, base_shard: tuple[int, int] = (0, 1), progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Reads safetensors into the prepared layout; see :func:`checkpoints.prepare.load_weights`."""
    source = TensorFolder(folder)
    if spec.config.tie_embeddings:
        source.share_table()
    source.check(tensor_shapes(spec.config), ignored_tensors(spec.config))
    buffers, plans, arrays = spec.buffers, plan(spec), allocate(spec, base_shard)

    def fill(name: str) -> int:
        start, stop = row_range(buffers[name], base_shard)
        _fill(arrays[name], source, plans[name], start, stop)
        return arrays[name].nbytes

    total, done = sum(array.nbytes for array in arrays.values()), 0
    # numpy drops the interpreter's lock while it copies, and more than one reader hides the disk's latency.
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for nbytes in pool.map(fill, arrays):
            done += nbytes
            if progress is not None:
                progress(done, total)
    return arrays


def _fill(target: np.ndarray, source: TensorFolder, rows: BufferPlan, start: int, stop: int) -> None:
    """Writes the buffer's rows ``[start, stop)`` to ``target``: the pieces, and zeros between them."""
    end = 0
    for whole in rows.pieces:
        if (piece := whole.clip(start, stop)) is None:
            continue
        target[end : piece.target] = 0
        end = piece.target + piece.rows
        tensor = source.read(piece.tensor)
        if rows.transposed:
            copy_transposed(target[piece.target : end], tensor[:, piece.source : piece.source + piece.rows])
        else:
            copy(target[piece.target : end], tensor[piece.source : piece.source + piece.rows])
    target[end:] = 0
