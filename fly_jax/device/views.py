"""Views: ``jax.Array``s over a row range of a resident buffer, made without copying a byte."""

from __future__ import annotations

import ctypes
import math
from typing import Any, cast

import jax
import numpy as np
from jax import Array


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_DLPACK_CODES = {"float32": 2, "float16": 2, "bfloat16": 4, "uint16": 1}


class RowRange:
    """Rows ``[start, stop)`` of a single-device array, as a DLPack exporter.

    The consumer's array does not keep the base alive: whoever owns the views owns the base too.
    """

    def __init__(self, base: Array, start: int, stop: int) -> None:
        self.base, self.start, self.stop = base, start, stop

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = cast(Any, self.base).__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, **_: object) -> object:
        base = self.base
        shape = (self.stop - self.start, *base.shape[1:])
        offset = self.start * math.prod(base.shape[1:]) * base.dtype.itemsize
        # One malloc'ed block holds struct and shape and its deleter is free(): a deleter written in Python crashes
        # when the interpreter exits before the runtime, and a null one makes XLA throw.
        size = ctypes.sizeof(_ManagedTensor)
        address = _libc.malloc(size + 8 * len(shape))
        dims = (ctypes.c_int64 * len(shape)).from_address(address + size)
        for axis, length in enumerate(shape):
            dims[axis] = length
        managed = _ManagedTensor.from_address(address)
        dtype = _DType(_DLPACK_CODES[base.dtype.name], 8 * base.dtype.itemsize, 1)
        data = base.unsafe_buffer_pointer() + offset
        shape_pointer = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
        managed.tensor = _Tensor(data, _Device(*self.__dlpack_device__()), len(shape), dtype, shape_pointer, None, 0)
        managed.context = None
        managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p).value
        return _new_capsule(address, b"dltensor", None)


def view_rows(base: Array, start: int, stop: int) -> Array:
    """Rows ``[start, stop)`` of a single-device array on the same device, sharing its memory.

    On CPU a numpy view put back on the device aliases it where it starts at a multiple of 64 bytes; elsewhere a
    DLPack capsule over the sub-range does.

    Raises:
        RuntimeError: the runtime made a copy.
    """
    if (start, stop) == (0, base.shape[0]):
        return base
    (device,) = base.devices()
    if device.platform == "cpu":
        view = jax.device_put(np.asarray(base)[start:stop], device)
    else:
        view = jax.dlpack.from_dlpack(RowRange(base, start, stop), copy=False)
    expected = base.unsafe_buffer_pointer() + start * math.prod(base.shape[1:]) * base.dtype.itemsize
    if view.unsafe_buffer_pointer() != expected:
        raise RuntimeError(f"rows {start}:{stop} of {base.shape} {base.dtype} on {device} were copied, not viewed")
    return view
