"""Who attends: chosen once, at start."""

from __future__ import annotations

import jax

from kernels_pallas.interface import AttentionBackend
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.xla import XLABackend

BACKENDS = ("xla", "pallas")
_GPU = ("gpu", "cuda")


def default_backend(device: jax.Device) -> str:
    """Kernels where there is a GPU."""
    return "pallas" if device.platform in _GPU else "xla"


def attention_backend(name: str, device: jax.Device) -> AttentionBackend:
    """The backend of this name for programs of this device.

    Raises:
        ValueError: there is none of this name.
    """
    if name == "xla":
        return XLABackend()
    if name == "pallas":
        return PallasBackend(device.device_kind, interpret=device.platform not in _GPU)
    raise ValueError(f"attention backend {name!r} is none of {', '.join(BACKENDS)}")
