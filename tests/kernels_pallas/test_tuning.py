from __future__ import annotations

from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import pytest

from kernels_pallas import KVLayout, tuning
from kernels_pallas.tuning import TABLE, Entry, table_row, tuning_for

UNKNOWN = "a chip that nobody listed"


def layout(head_dim: int, dtype: str = "bfloat16", block_tokens: int = 16) -> KVLayout:
    return KVLayout((2, 2, 8, block_tokens, head_dim), 1, jnp.dtype(dtype))


@pytest.mark.parametrize("chip", [UNKNOWN, "NVIDIA H200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_shape_gets_sizes_that_triton_takes(chip: str, dtype: str) -> None:
    for head_dim, queries in product((16, 64, 80, 96, 112, 128, 192, 256), (1, 16)):
        tuning = tuning_for(chip, layout(head_dim, dtype), group=4, queries=queries)
        assert tuning.tile_tokens >= 16
        assert tuning.tile_tokens & (tuning.tile_tokens - 1) == 0
        assert tuning.num_warps in (4, 8)
        # As check-h200 reads it: two copies of a tile's keys and of its values, and the queries.
        width = 1 << (head_dim - 1).bit_length()
        tiles = 2 * 2 * tuning.tile_tokens + tuning.rows
        assert chip != UNKNOWN or tiles * width * jnp.dtype(dtype).itemsize <= 101376


def test_the_table_answers_for_its_chips_and_two_byte_pools_alone() -> None:
    for entry in TABLE:
        for chip in entry.chips:
            assert tuning_for(chip, layout(entry.head_dim), group=4, queries=1) == entry.decode
            assert tuning_for(chip, layout(entry.head_dim, "float16"), group=4, queries=16) == entry.prefill
        assert tuning_for(UNKNOWN, layout(entry.head_dim), group=4, queries=16) != entry.prefill
        assert tuning_for(entry.chips[0], layout(entry.head_dim, "float32"), group=4, queries=16) != entry.prefill


def test_work_is_cut_for_the_same_number_of_programs_at_every_degree() -> None:
    tuning = tuning_for("NVIDIA H200", layout(128), group=4, queries=1)
    for heads in (8, 4, 2, 1):
        programs = tuning.sizes(1, 4, heads).target_items * heads
        assert tuning.programs - heads < programs <= tuning.programs


def test_a_query_block_of_prompt_holds_as_many_queries_as_rows_allow() -> None:
    tuning = tuning_for("NVIDIA H200", layout(128), group=4, queries=16)
    assert tuning.sizes(16, 4, 8).block_queries == tuning.rows // 4
    assert tuning.sizes(16, 5, 8).block_queries == tuning.rows // 5
    assert tuning.sizes(1, 5, 8).block_queries == 1


def test_prompts_with_a_soft_cap_do_without_copying_ahead() -> None:
    plain, capped = (tuning_for("NVIDIA H200", layout(256), 4, 16, soft_cap=cap) for cap in (False, True))
    assert (plain.num_stages, capped.num_stages) == (5, 3)
    decodes = [tuning_for("NVIDIA H200", layout(256), 4, 1, soft_cap=cap) for cap in (False, True)]
    assert decodes[0] == decodes[1]


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"head_dim {entry.head_dim}")
def test_a_printed_row_is_what_the_table_says(entry: Entry) -> None:
    row = table_row(entry.head_dim, entry.decode, entry.prefill, entry.evidence)
    assert row is not None
    assert eval(row.rstrip(","), vars(tuning)) == entry
    other = replace(entry.decode, programs=entry.decode.programs + 1)
    assert table_row(entry.head_dim, other, entry.prefill, "") is None
