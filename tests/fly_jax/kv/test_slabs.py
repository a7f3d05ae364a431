from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.kv.blocks import BlockTable, KVCacheManager, KVCacheSpec
from fly_jax.kv.slabs import (
    HeadSplits,
    SlabMove,
    SlabPlace,
    exchange_rounds,
    relayout_splits,
    slab_moves,
    slab_tokens,
)
from fly_jax.layout import DeviceGroup, Layout


def _partitions(num_devices: int) -> Iterator[tuple[int, ...]]:
    """The degrees of every layout."""
    yield (num_devices,)
    if num_devices > 1:
        for left, right in product(_partitions(num_devices // 2), repeat=2):
            yield (*left, *right)


@pytest.mark.parametrize("base_tp", [1, 2])
def test_every_move_of_a_switch_has_a_program(base_tp: int) -> None:
    layouts = [Layout(degrees) for degrees in _partitions(8) if min(degrees) >= base_tp]
    for source, target in product(layouts, repeat=2):
        for old, new in product(source.groups, target.groups):
            if old != new and old.overlaps(new):
                wide = max(old, new, key=lambda group: group.num_devices)
                assert HeadSplits(old.tp, new.tp) in set(relayout_splits(wide, base_tp))


_places = st.builds(SlabPlace, st.integers(0, 3), st.integers(0, 20), st.integers(0, 3))
_moves = st.lists(st.builds(SlabMove, _places, _places), max_size=60)


def _devices(move: SlabMove) -> tuple[int, int]:
    return move.source.device, move.target.device


@given(_moves, st.integers(1, 7))
def test_rounds_keep_each_pairs_order_within_the_chunk_and_are_as_few_as_can_be(
    moves: list[SlabMove], chunk: int
) -> None:
    rounds = list(exchange_rounds(iter(moves), chunk))
    flat = [move for each in rounds for move in each]
    wanted = Counter(map(_devices, moves))
    for pair in wanted:
        assert [move for move in flat if _devices(move) == pair] == [move for move in moves if _devices(move) == pair]
    assert len(flat) == len(moves)
    assert all(0 < max(Counter(map(_devices, each)).values()) <= chunk for each in rounds)
    assert len(rounds) == max((-(-count // chunk) for count in wanted.values()), default=0)


@st.composite
def _requests(draw: st.DrawFn) -> tuple[KVCacheManager, BlockTable, BlockTable, int]:
    """A request's tables in two overlapping groups, in blocks with ids of their own on each device."""
    base_tp = draw(st.sampled_from((1, 2)))
    spec = KVCacheSpec(
        num_blocks=200,
        base_block_size=draw(st.sampled_from((1, 4))),
        num_layers=2,
        kv_heads=draw(st.sampled_from((1, 2, 4, 8, 24))),
        head_dim=8,
        bytes_per_element=2,
    )
    kv = KVCacheManager(spec, 8, base_tp)
    degrees = st.sampled_from([degree for degree in (1, 2, 4, 8) if degree >= base_tp])
    source_tp, target_tp = draw(degrees), draw(degrees)
    wide = max(source_tp, target_tp)
    source, target = (
        DeviceGroup(draw(st.integers(0, wide // degree - 1)) * degree, degree) for degree in (source_tp, target_tp)
    )
    tokens = draw(st.integers(0, 40))
    tables = kv.new_table(source), kv.new_table(target)
    for device, allocator in enumerate(kv.allocators):
        allocator.allocate(device)
    for table in tables:
        assert kv.grow(table, tokens)
    return kv, *tables, tokens


def _records(
    spec: KVCacheSpec, base_tp: int, table: BlockTable, tokens: int
) -> dict[tuple[int, int, int], tuple[int, int]]:
    """``(device, block, place in it) -> (head, position)``, for every head and token that a table holds."""
    tp = table.group.tp
    found = {}
    for rank, device in enumerate(table.group.rank_order(base_tp)):
        for local, position in product(range(spec.local_kv_heads(tp)), range(tokens)):
            block, offset = divmod(position, spec.block_tokens(tp))
            place = local * spec.block_tokens(tp) + offset
            found[device, table.rows[rank][block], place] = (spec.first_kv_head(tp, rank) + local, position)
    return found


def _slab_records(spec: KVCacheSpec, tp: int, splits: HeadSplits, place: SlabPlace) -> list[tuple[int, int, int]]:
    """Places of a slab's heads and tokens, in the order in which it travels."""
    heads = min(spec.local_kv_heads(splits.source_tp), spec.local_kv_heads(splits.target_tp))
    tokens = min(spec.block_tokens(splits.source_tp), spec.block_tokens(splits.target_tp))
    split_by_tokens = spec.block_tokens(tp) > tokens
    first_head, first_token = (0, place.part * tokens) if split_by_tokens else (place.part * heads, 0)
    assert first_head + heads <= spec.local_kv_heads(tp)
    assert first_token + tokens <= spec.block_tokens(tp)
    return [
        (place.device, place.block, (first_head + head) * spec.block_tokens(tp) + first_token + token)
        for head, token in product(range(heads), range(tokens))
    ]


@given(_requests())
def test_moves_bring_every_head_and_token_to_its_place_once(
    request_: tuple[KVCacheManager, BlockTable, BlockTable, int],
) -> None:
    kv, source, target, tokens = request_
    spec, splits = kv.spec, HeadSplits(source.group.tp, target.group.tp)
    moves = list(slab_moves(spec, kv.base_tp, source, target, range(tokens)))
    held = _records(spec, kv.base_tp, source, tokens)
    arrived: dict[tuple[int, int, int], tuple[int, int]] = {}
    for move in moves:
        places = zip(
            _slab_records(spec, splits.source_tp, splits, move.source),
            _slab_records(spec, splits.target_tp, splits, move.target),
            strict=True,
        )
        arrived |= {to: held[origin] for origin, to in places if origin in held}
    assert arrived == _records(spec, kv.base_tp, target, tokens)
    # One move a target slab, and as many bytes as the target's devices hold of these tokens, rounded up to slabs.
    assert len({move.target for move in moves}) == len(moves)
    slab_tokens = min(spec.block_tokens(splits.source_tp), spec.block_tokens(splits.target_tp))
    whole_slabs = -(-tokens // slab_tokens) * slab_tokens
    token_bytes = spec.block_bytes // spec.block_tokens(splits.target_tp)
    assert len(moves) * spec.slab_bytes(splits.source_tp, splits.target_tp) == (
        whole_slabs * token_bytes * splits.target_tp
    )


@given(_requests())
def test_a_slab_travels_only_if_its_device_does_not_hold_it(
    request_: tuple[KVCacheManager, BlockTable, BlockTable, int],
) -> None:
    kv, source, target, tokens = request_
    spec, tp = kv.spec, source.group.tp
    own = {
        (device, head)
        for rank, device in enumerate(source.group.rank_order(kv.base_tp))
        for head in range(spec.first_kv_head(tp, rank), spec.first_kv_head(tp, rank) + spec.local_kv_heads(tp))
    }
    held, there = (_records(spec, kv.base_tp, table, tokens) for table in (source, target))
    splits = HeadSplits(tp, target.group.tp)
    for move in slab_moves(spec, kv.base_tp, source, target, range(tokens)):
        head, position = there[_slab_records(spec, splits.target_tp, splits, move.target)[0]]
        assert held[_slab_records(spec, tp, splits, move.source)[0]] == (head, position)
        if (move.target.device, head) in own:
            assert move.source.device == move.target.device


def test_moves_of_a_request_go_forward_through_its_tokens_on_each_pair_of_devices() -> None:
    kv = KVCacheManager(KVCacheSpec(64, 4, 1, 4, 8, 2), 4, base_tp=1)
    source, target = kv.new_table(DeviceGroup(0, 1)), kv.new_table(DeviceGroup(0, 4))
    for table in (source, target):
        assert kv.grow(table, 50)
    moves = list(slab_moves(kv.spec, 1, source, target, range(50)))
    for device in range(4):
        blocks = [source.rows[0].index(move.source.block) for move in moves if move.target.device == device]
        assert all(one <= other for one, other in pairwise(blocks))


@given(_requests(), st.data())
def test_moves_in_parts_are_the_moves_of_the_whole(
    request_: tuple[KVCacheManager, BlockTable, BlockTable, int], data: st.DataObject
) -> None:
    """What is copied ahead, up to a whole slab, and the tail leave nothing out and move nothing twice."""
    kv, source, target, tokens = request_
    slab = slab_tokens(kv.spec, source.group, target.group)
    ahead = slab * data.draw(st.integers(0, tokens // slab))
    whole, first, tail = (
        list(slab_moves(kv.spec, kv.base_tp, source, target, part))
        for part in (range(tokens), range(ahead), range(ahead, tokens))
    )
    assert Counter(first) + Counter(tail) == Counter(whole)
