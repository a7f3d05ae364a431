from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.models.config import ModelConfig
from fly_jax.models.partition import ROW_ALIGNMENT, Partition
from tests.fly_jax.models.test_config import read


def model(kv_heads: int, ratio: int, *, ffn: int = 90, vocab: int = 323) -> ModelConfig:
    return read(
        num_attention_heads=kv_heads * ratio, num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=vocab
    )


models = st.builds(model, st.integers(1, 12), st.integers(1, 9), ffn=st.integers(1, 400), vocab=st.integers(1, 600))
max_tps = st.sampled_from((1, 2, 4, 8, 16))


@given(models, max_tps)
def test_every_degree_divides_every_padded_size(config: ModelConfig, max_tp: int) -> None:
    part = Partition.of(config, max_tp)
    tp = 1
    while tp <= max_tp:
        assert part.units % tp == part.ffn % tp == part.vocab % tp == 0
        assert part.ffn // tp % ROW_ALIGNMENT == part.vocab // tp % ROW_ALIGNMENT == 0
        tp *= 2
    assert part.ffn >= config.intermediate_size
    assert part.vocab >= config.vocab_size
    assert part.ffn - config.intermediate_size < max_tp * ROW_ALIGNMENT
    assert part.vocab - config.vocab_size < max_tp * ROW_ALIGNMENT
    assert part.ffn_chunk * max_tp == part.ffn


@given(models, max_tps)
def test_each_query_head_is_computed_once_beside_its_own_kv_head(config: ModelConfig, max_tp: int) -> None:
    part = Partition.of(config, max_tp)
    queries, kv_heads = part.query_heads_of_unit(config), part.kv_head_of_unit(config)
    assert queries.shape == (part.units, part.queries_per_unit)
    assert sorted(queries[queries >= 0]) == list(range(config.num_heads))
    ratio = config.num_heads // config.num_kv_heads
    owner = np.broadcast_to(kv_heads[:, None], queries.shape)
    np.testing.assert_array_equal(queries[queries >= 0] // ratio, owner[queries >= 0])


@given(models, max_tps)
def test_each_kv_head_is_kept_once_for_each_copy(config: ModelConfig, max_tp: int) -> None:
    part = Partition.of(config, max_tp)
    heads = part.kv_head_of_unit(config)
    assert [int((heads == head).sum()) for head in range(config.num_kv_heads)] == [part.kv_copies] * config.num_kv_heads
    assert part.kv_heads * part.kv_copies == part.units >= max_tp


@pytest.mark.parametrize(
    ("kv_heads", "ratio", "max_tp", "kept", "copies", "queries"),
    [
        (8, 4, 4, 8, 1, 4),
        (3, 3, 4, 4, 1, 3),
        (5, 1, 4, 8, 1, 1),
        (2, 4, 4, 2, 2, 2),
        (1, 7, 4, 1, 4, 2),
        (1, 7, 1, 1, 1, 7),
        (2, 3, 8, 2, 4, 1),
    ],
)
def test_kv_heads_are_padded_or_copied(
    kv_heads: int, ratio: int, max_tp: int, kept: int, copies: int, queries: int
) -> None:
    part = Partition.of(model(kv_heads, ratio), max_tp)
    assert (part.kv_heads, part.kv_copies, part.queries_per_unit) == (kept, copies, queries)


@given(models, max_tps)
def test_the_cache_has_a_place_for_every_kv_head_of_every_rank(config: ModelConfig, max_tp: int) -> None:
    part = Partition.of(config, max_tp)
    spec = KVCacheSpec(4, 16, num_layers=2, kv_heads=part.kv_heads, head_dim=16, bytes_per_element=2)
    tp = 1
    while tp <= max_tp:
        assert spec.local_kv_heads(tp) * tp >= part.kv_heads
        assert spec.block_tokens(tp) * spec.local_kv_heads(tp) == 16 * part.kv_heads
        tp *= 2
