"""fly-jax: an LLM serving engine that changes its DP/TP layout while it serves.

Nothing here imports jax until it is used, so that virtual CPU devices can still be configured
(see :mod:`fly_jax.platform`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fly_jax.async_engine import AsyncEngine
    from fly_jax.config import EngineConfig
    from fly_jax.llm import LLM
    from fly_jax.outputs import RequestOutput
    from fly_jax.sampling_params import SamplingParams

__version__ = "0.1.0"
_EXPORTS = {
    "LLM": "fly_jax.llm",
    "AsyncEngine": "fly_jax.async_engine",
    "EngineConfig": "fly_jax.config",
    "RequestOutput": "fly_jax.outputs",
    "SamplingParams": "fly_jax.sampling_params",
}
__all__ = ["LLM", "AsyncEngine", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fly_jax' has no attribute {name!r}")
