"""Sizes of the prepared layout: how heads, FFN and vocabulary are padded so that every TP degree divides them.

Everything is decided by the model and by ``max_tp``, the widest degree that the devices allow, so that the one
prepared copy of the weights serves every degree by contiguous views.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fly_jax.models.config import ModelConfig

# Rows of a shard are padded to this, so that every view starts at a multiple of 64 bytes: less is not aliased on CPU.
ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Partition:
    """Padded sizes of one model at one ``max_tp``.

    Attention is cut into ``units``, each ``queries_per_unit`` query heads with one key and one value head.
    Where there are fewer KV heads than ``max_tp``, a KV head is repeated in ``kv_copies`` successive units
    and its query heads are dealt out among them.

    Attributes:
        kv_heads: KV heads kept in the cache at TP 1 (padded, without copies).
        ffn: padded intermediate size.
        vocab: padded vocabulary.
    """

    max_tp: int
    units: int
    kv_copies: int
    queries_per_unit: int
    head_dim: int
    ffn: int
    vocab: int

    @classmethod
    def of(cls, config: ModelConfig, max_tp: int) -> Partition:
        ratio = config.num_heads // config.num_kv_heads
        if config.num_kv_heads >= max_tp:
            kv_heads, copies = _round_up(config.num_kv_heads, max_tp), 1
        else:
            kv_heads = 1 << (config.num_kv_heads - 1).bit_length()
            copies = max_tp // kv_heads
        return cls(
            max_tp=max_tp,
            units=kv_heads * copies,
            kv_copies=copies,
            queries_per_unit=-(-ratio // copies),
            head_dim=config.head_dim,
            ffn=max_tp * _round_up(-(-config.intermediate_size // max_tp), ROW_ALIGNMENT),
            vocab=_round_up(config.vocab_size, max_tp * ROW_ALIGNMENT),
        )

    @property
    def kv_heads(self) -> int:
        return self.units // self.kv_copies

    @property
    def ffn_chunk(self) -> int:
        """FFN columns of one of the ``max_tp`` gate/up chunk pairs."""
        return self.ffn // self.max_tp

    def kv_head_of_unit(self, config: ModelConfig) -> np.ndarray:
        """The checkpoint's KV head of each unit, -1 where it is padding: int ``[units]``."""
        heads = np.arange(self.units) // self.kv_copies
        return np.where(heads < config.num_kv_heads, heads, -1)

    def query_heads_of_unit(self, config: ModelConfig) -> np.ndarray:
        """The checkpoint's query heads of each unit, -1 where padded: int ``[units, queries_per_unit]``."""
        ratio = config.num_heads // config.num_kv_heads
        within = (np.arange(self.units) % self.kv_copies)[:, None] * self.queries_per_unit
        within = within + np.arange(self.queries_per_unit)[None, :]
        kv_head = self.kv_head_of_unit(config)[:, None]
        return np.where((kv_head >= 0) & (within < ratio), kv_head * ratio + within, -1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
