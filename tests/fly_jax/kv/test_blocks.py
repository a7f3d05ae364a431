from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.kv.blocks import BlockAllocator, KVCacheManager, KVCacheSpec
from fly_jax.layout import DeviceGroup

TP_DEGREES = (1, 2, 4, 8)

specs = st.builds(
    KVCacheSpec,
    num_blocks=st.integers(1, 64),
    base_block_size=st.sampled_from((1, 4, 16)),
    num_layers=st.integers(1, 4),
    kv_heads=st.sampled_from((1, 2, 4, 8, 16, 24)),
    head_dim=st.sampled_from((16, 64)),
    bytes_per_element=st.sampled_from((2, 4)),
)


def spec(num_blocks: int = 8, base_block_size: int = 4, kv_heads: int = 4) -> KVCacheSpec:
    return KVCacheSpec(num_blocks, base_block_size, num_layers=2, kv_heads=kv_heads, head_dim=16, bytes_per_element=2)


@given(specs, st.sampled_from(TP_DEGREES))
def test_a_block_has_the_same_bytes_at_every_degree(spec: KVCacheSpec, tp: int) -> None:
    assert math.prod(spec.block_shape(tp)) == spec.block_elements
    assert spec.block_bytes == spec.block_elements * spec.bytes_per_element


@given(specs, st.sampled_from(TP_DEGREES), st.integers(0, 1000))
def test_blocks_for_is_the_least_number_that_holds_the_tokens(spec: KVCacheSpec, tp: int, tokens: int) -> None:
    blocks = spec.blocks_for(tokens, tp)
    assert blocks * spec.block_tokens(tp) >= tokens
    assert blocks == 0 or (blocks - 1) * spec.block_tokens(tp) < tokens


def test_block_tokens_grow_with_the_degree_until_each_device_has_one_head() -> None:
    assert [spec(kv_heads=4).block_tokens(tp) for tp in TP_DEGREES] == [4, 8, 16, 16]
    assert [spec(kv_heads=1).block_tokens(tp) for tp in TP_DEGREES] == [4, 4, 4, 4]
    assert [spec(kv_heads=4).capacity_tokens(tp) for tp in TP_DEGREES] == [32, 64, 128, 128]


def test_every_block_is_handed_out_once() -> None:
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(3), allocator.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    with pytest.raises(ValueError, match="1 blocks asked for, 0 free"):
        allocator.allocate(1)
    allocator.free(first)
    assert sorted(allocator.allocate(3)) == sorted(first)


@pytest.mark.parametrize("wrong", [[3], [0, 0], [0, 3]], ids=["not held", "twice", "one of two not held"])
def test_a_wrong_free_is_refused_and_changes_nothing(wrong: list[int]) -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    with pytest.raises(ValueError, match="not all held"):
        allocator.free(wrong)
    assert allocator.num_free == 2
    allocator.free(held)
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


def test_a_double_free_is_refused() -> None:
    allocator = BlockAllocator(2)
    held = allocator.allocate(1)
    allocator.free(held)
    with pytest.raises(ValueError, match="not all held"):
        allocator.free(held)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 7)), max_size=60))
def test_a_block_is_free_again_when_its_last_holder_has_freed_it(operations: list[tuple[str, int]]) -> None:
    """Against a plain count of holders; what is not allowed is refused and changes nothing."""
    allocator, holders = BlockAllocator(8), Counter[int]()
    for operation, block in operations:
        if operation == "allocate" and allocator.num_free:
            (taken,) = allocator.allocate(1)
            assert holders[taken] == 0
            holders[taken] = 1
        elif operation != "allocate" and holders[block]:
            getattr(allocator, operation)([block])
            holders[block] += 1 if operation == "share" else -1
        elif operation != "allocate":
            with pytest.raises(ValueError, match="not all held"):
                getattr(allocator, operation)([block])
        assert allocator.num_free == sum(holders[each] == 0 for each in range(8))


def test_a_table_grows_on_every_device_of_its_group_and_on_no_other() -> None:
    kv = KVCacheManager(spec(), num_devices=4, base_tp=1)
    table = kv.new_table(DeviceGroup(2, 2))
    assert kv.grow(table, 9)  # 8 tokens a block at degree 2
    assert [len(row) for row in table.rows] == [2, 2]
    assert [allocator.num_free for allocator in kv.allocators] == [8, 8, 6, 6]
    assert kv.missing_blocks(table, 16) == 0
    assert kv.missing_blocks(table, 17) == 1
    assert kv.grow(table, 16)
    assert table.num_blocks == 2
    assert kv.usage == pytest.approx(4 / 32)
    kv.release(table)
    assert kv.usage == 0.0
    assert table.num_blocks == 0


def test_growing_never_shrinks_a_table() -> None:
    kv = KVCacheManager(spec(), num_devices=1, base_tp=1)
    table = kv.new_table(DeviceGroup(0, 1))
    kv.grow(table, 12)
    before = [list(row) for row in table.rows]
    assert kv.grow(table, 1)
    assert table.rows == before


def test_a_table_that_cannot_grow_is_left_as_it_was() -> None:
    kv = KVCacheManager(spec(num_blocks=4), num_devices=2, base_tp=1)
    narrow, wide = kv.new_table(DeviceGroup(1, 1)), kv.new_table(DeviceGroup(0, 2))
    assert kv.grow(narrow, 12)
    assert kv.free_blocks(DeviceGroup(0, 2)) == 1  # of the fuller device
    assert not kv.grow(wide, 9)
    assert wide.rows == [[], []]
    assert [allocator.num_free for allocator in kv.allocators] == [4, 1]
    assert kv.grow(wide, 8)


def test_rows_follow_the_rank_order_of_the_base_tp() -> None:
    kv = KVCacheManager(spec(), num_devices=4, base_tp=2)
    group = DeviceGroup(0, 4)
    assert group.rank_order(2) == (0, 2, 1, 3)
    kv.allocators[2].allocate(3)  # so that device 2's next block is another than everybody else's
    table = kv.new_table(group)
    kv.grow(table, 1)
    assert table.rows[0] == table.rows[2] == table.rows[3]
    assert table.rows[1] != table.rows[0]
    kv.release(table)
    assert [allocator.num_free for allocator in kv.allocators] == [8, 8, 5, 8]
