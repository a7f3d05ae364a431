"""Who attends: chosen once, at start."""

from __future__ import annotations

import jax

from kernels_pallas.interface import AttentionBackend
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.xla import XLABackend

BACKENDS = ("xla", "pallas")
_GPU = ("gpu", "cuda")
_OLDEST_CAPABILITY = 8.0


def default_backend(device: jax.Device) -> str:
    """Kernels where there is an NVIDIA GPU that Triton compiles for: Ampere or newer."""
    capability = str(getattr(device, "compute_capability", ""))
    newer = capability.replace(".", "", 1).isdigit() and float(capability) >= _OLDEST_CAPABILITY
    return "pallas" if device.platform in _GPU and newer else "xla"


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
