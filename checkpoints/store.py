"""Named row parts of host arrays in an Orbax checkpoint, written and read without a second copy of them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from checkpoints.memory import copy
from checkpoints.progress import Progress
from fly_jax.errors import CheckpointError

Parts = Mapping[str, Mapping[int, np.ndarray]]

# Orbax allocates what it restores itself, not aligned to 64 bytes: it does so for this fraction of the bytes at a
# time. While tensorstore decodes, a batch lives up to three times; one restore call takes about 0.1 s.
_BATCHES = 64
_MIN_BATCH_BYTES = 1 << 20


class _Borrowed(np.ndarray):
    """A view that Orbax writes from where it lies: it deep-copies host arrays first, in case they change meanwhile."""

    def __deepcopy__(self, memo: Any) -> _Borrowed:
        return self


def write_parts(folder: Path, parts: Parts) -> None:
    """Writes a new Orbax checkpoint with the tree ``{name: {part: array}}``, uncompressed.

    Raises:
        CheckpointError: it cannot be written, such as on a full disk.
    """
    tree = {name: {str(i): part.view(_Borrowed) for i, part in row.items()} for name, row in parts.items()}
    with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:  # bf16 weights shrink little, and load slowly
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
        except Exception as error:  # Orbax and tensorstore raise whatever their lowest layer does
            reason = _reason(error)
            raise CheckpointError(f"{folder} cannot be written ({reason}): check its disk's free space") from error


def read_parts(folder: Path, targets: Parts, progress: Progress | None = None) -> None:
    """Fills ``targets`` (any subset of the stored parts), converting between float types.

    Raises:
        CheckpointError: the checkpoint is damaged, or a part is missing or has another shape than its target.
    """
    total, done = sum(part.nbytes for row in targets.values() for part in row.values()), 0
    with ocp.PyTreeCheckpointer() as checkpointer:
        for batch in _batches(targets, max(total // _BATCHES, _MIN_BATCH_BYTES)):
            _read_batch(checkpointer, folder.absolute(), batch)
            done += sum(target.nbytes for target in batch.values())
            if progress is not None:
                progress(done, total)


def _batches(targets: Parts, limit: int) -> Iterator[dict[tuple[str, int], np.ndarray]]:
    """Groups of at most ``limit`` bytes, or of one part that is larger.

    The largest come first: their temporaries take the place of what is not loaded yet.
    """
    flat = [((name, index), part) for name, row in targets.items() for index, part in row.items()]
    batch: dict[tuple[str, int], np.ndarray] = {}
    room = limit
    for key, part in sorted(flat, key=lambda item: -item[1].nbytes):
        if batch and part.nbytes > room:
            yield batch
            batch, room = {}, limit
        batch[key] = part
        room -= part.nbytes
    if batch:
        yield batch


def _read_batch(checkpointer: ocp.Checkpointer, folder: Path, batch: Mapping[tuple[str, int], np.ndarray]) -> None:
    item: dict[str, dict[str, Any]] = {}
    for name, index in batch:
        item.setdefault(name, {})[str(index)] = ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=item, partial_restore=True)
    try:
        restored = checkpointer.restore(folder, args=arguments)
    except Exception as error:  # see write_parts
        reason = _reason(error)
        raise CheckpointError(f"{folder} cannot be restored ({reason}): run fly-jax convert again") from error
    for (name, index), target in batch.items():
        part = restored[name].get(str(index))
        shape = getattr(part, "shape", None)
        if shape != target.shape:
            raise CheckpointError(
                f"{folder}: part {index} of {name} has shape {shape}, expected {target.shape}: "
                "run fly-jax convert again"
            )
        copy(target, part)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
