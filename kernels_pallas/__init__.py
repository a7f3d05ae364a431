"""Attention over paged KV memory: two functions, in plain JAX and as Pallas kernels."""

from kernels_pallas.backend import BACKENDS, attention_backend, default_backend
from kernels_pallas.interface import AttentionBackend, AttentionOptions, KVLayout, QueryRuns, storage_dtype

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionOptions",
    "KVLayout",
    "QueryRuns",
    "attention_backend",
    "default_backend",
    "storage_dtype",
]
