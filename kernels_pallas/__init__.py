"""Attention over paged KV memory. ``paged_attention`` and ``write_kv`` are the whole interface."""

from kernels_pallas.paged import KVLayout, paged_attention, write_kv

__all__ = ["KVLayout", "paged_attention", "write_kv"]
