"""Host arrays that devices can alias, and copies into them that need no temporaries."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from fly_jax.errors import CheckpointError

ALIGNMENT = 64  # bytes; XLA on CPU copies a host array that starts anywhere else

# Both sides of a transposed tile stay in the first two cache levels: 5 times as fast as one strided copy.
_TILE = 128


def aligned_empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of 64 bytes (numpy's own often do not)."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, converting between float types; numpy converts in chunks of a few thousand elements.

    Raises:
        CheckpointError: a value is too large for float16.
    """
    target, source = _as_bits(target, source)
    with np.errstate(over="ignore"):
        np.copyto(target, source, casting="unsafe")
    _check_range(target, source)


def copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source.T`` for ``target [m, n]`` and ``source [n, m]``, tile by tile; raises as :func:`copy`."""
    target, source = _as_bits(target, source)
    for row in range(0, target.shape[0], _TILE):
        for column in range(0, target.shape[1], _TILE):
            tile = source[column : column + _TILE, row : row + _TILE]
            with np.errstate(over="ignore"):
                np.copyto(target[row : row + _TILE, column : column + _TILE], tile.T, casting="unsafe")
    _check_range(target, source)


def _check_range(target: np.ndarray, source: np.ndarray) -> None:
    """float16 ends at 65,504, far below the other float types: a larger weight would have become infinite."""
    if target.dtype == np.float16 != source.dtype and not np.isfinite(target).all():
        raise CheckpointError(
            "a weight does not fit float16, whose largest value is 65,504: use --dtype bfloat16 or float32"
        )


def _as_bits(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 to bfloat16 moves as integers: numpy copies extension types one element at a time when strided."""
    if target.dtype == source.dtype == ml_dtypes.bfloat16:
        return target.view(np.uint16), source.view(np.uint16)
    return target, source
