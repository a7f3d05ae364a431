from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.device.step_upload import (
    CHUNK_TOKENS,
    BackboneShape,
    PackedLayout,
    chunk_blocks,
    pack_backbone,
    pack_sampling,
    pack_scoring,
    sampling_layout,
    scoring_layout,
    table_width,
)
from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup
from fly_jax.sampling_params import MAX_SEED
from fly_jax.scheduling.group import GroupScheduler
from fly_jax.scheduling.step import TILE_TOKENS, ScheduledRow, SchedulerLimits, SlotPool, StepPlan
from tests.fly_jax.builders import make_kv, make_request, nothing_to_reclaim


def mixed_plan(size: int = 2) -> StepPlan:
    """Two decodes, the second of a token that only the device knows, and two prompt chunks; one is not complete."""
    kv = make_kv(num_devices=2)
    for device, allocator in enumerate(kv.allocators):
        allocator.allocate(device + 1)  # block ids differ from device to device
    scheduler = GroupScheduler(DeviceGroup(0, size), SchedulerLimits(8, 64), kv, SlotPool(8 * size))
    known, unknown = make_request([10, 11], name="known"), make_request([20, 21], name="unknown")
    for request in (known, unknown):
        assert scheduler.admit(request)
    scheduler.schedule(scheduler.remove, nothing_to_reclaim)
    known.output_ids, known.num_pending = [12], 0
    short, long = make_request([30, 31, 32], name="short"), make_request(range(100, 190), name="long")
    for request in (short, long):
        assert scheduler.admit(request)
    plan = scheduler.schedule(scheduler.remove, nothing_to_reclaim)
    assert plan is not None
    assert [row.request for row in plan.rows] == [known, unknown, short, long]
    return plan


def unpack(plan: StepPlan, shape: BackboneShape, rank: int) -> dict[str, np.ndarray]:
    packed = pack_backbone(plan, shape)
    assert packed.shape == (plan.group.tp, shape.layout.size)
    return {name: np.asarray(array) for name, array in shape.layout.unpack(jnp.asarray(packed[rank])).items()}


SHAPE = BackboneShape(tokens=96, rows=6, table_blocks=32, sample_rows=5, mixed=True)


@given(
    fields=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    ranks=st.integers(1, 3),
    repeated=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_packed_arrays_come_out_as_they_went_in(
    fields: list[tuple[int, ...]], ranks: int, repeated: list[bool]
) -> None:
    layout = PackedLayout(tuple((f"f{i}", shape) for i, shape in enumerate(fields)))
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(-(2**31), 2**31, shape if once else (ranks, *shape), np.int32)
        for (name, shape), once in zip(layout.fields, repeated, strict=False)
    }
    packed = layout.pack(ranks, arrays)
    assert packed.shape == (ranks, layout.size)
    for rank in range(ranks):
        for (name, shape), once in zip(layout.fields, repeated, strict=False):
            unpacked = layout.unpack(packed[rank])[name]
            assert unpacked.shape == shape
            np.testing.assert_array_equal(unpacked, arrays[name] if once else arrays[name][rank])


def test_decodes_take_the_first_places_and_each_prompt_chunk_whole_tiles() -> None:
    plan = mixed_plan()
    assert plan.places == [0, 1, TILE_TOKENS, 2 * TILE_TOKENS]
    assert plan.num_tiled_tokens == 4 * TILE_TOKENS
    arrays = unpack(plan, SHAPE, rank=0)
    assert arrays["num_decodes"] == [2]
    expected = np.full(SHAPE.tokens, -1)
    expected[0], expected[1] = 2, 2
    expected[16:19], expected[32:64] = range(3), range(32)
    np.testing.assert_array_equal(arrays["positions"], expected)


def test_tokens_that_only_the_device_knows_are_minus_one_at_their_rows_slot() -> None:
    plan = mixed_plan()
    arrays = unpack(plan, SHAPE, rank=0)
    assert arrays["tokens"][:2].tolist() == [12, -1]
    assert arrays["tokens"][16:19].tolist() == [30, 31, 32]
    assert arrays["tokens"][32:64].tolist() == list(range(100, 132))
    assert arrays["row_slots"][:4].tolist() == [row.slot for row in plan.rows]
    used = arrays["positions"] >= 0
    rows = np.concatenate([[0, 1], np.full(3, 2), np.full(32, 3)])
    np.testing.assert_array_equal(arrays["token_rows"][used], rows)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_the_block_table_of_its_own_device(rank: int) -> None:
    plan = mixed_plan()
    tables = unpack(plan, SHAPE, rank)["tables"]
    for index, row in enumerate(plan.rows):
        assert row.request.table is not None
        blocks = row.request.table.rows[rank]
        assert tables[index, : len(blocks)].tolist() == blocks
    assert plan.rows[0].request.table is not None
    one, other = plan.rows[0].request.table.rows
    assert one != other


def test_sampled_rows_point_at_their_last_place_in_the_order_of_the_head() -> None:
    plan = mixed_plan()
    assert [row.request.request_id for row in plan.sampled] == ["known", "unknown", "short"]
    assert unpack(plan, SHAPE, rank=0)["sample_places"].tolist() == [0, 1, 18, 0, 0]


def test_context_lengths_are_the_prompts_until_tokens_are_generated() -> None:
    lengths = unpack(mixed_plan(), SHAPE, rank=0)["context_lengths"]
    assert lengths[:2].tolist() == [3, 3]
    assert lengths[16:19].tolist() == [3, 3, 3]
    assert set(lengths[32:64].tolist()) == {90}


def test_a_step_without_rows_writes_nowhere() -> None:
    arrays = unpack(StepPlan(DeviceGroup(0, 2), (), ()), SHAPE, rank=1)
    assert (arrays["positions"] == -1).all()
    assert arrays["num_decodes"] == [0]


def row_of(start: int, count: int, **params: float | int) -> ScheduledRow:
    request = make_request([1, 2, 3], **params)
    return ScheduledRow(request, start, count, samples=True, scores=False, slot=5)


@given(seed=st.integers(0, MAX_SEED), temperature=st.floats(0, 100), top_p=st.floats(0, 1, exclude_min=True))
def test_sampling_options_travel_bit_for_bit(seed: int, temperature: float, top_p: float) -> None:
    row = row_of(0, 3, seed=seed, temperature=temperature, top_p=top_p, min_p=0.25, top_k=7, logprobs=2)
    columns = sampling_layout(4).unpack(pack_sampling((row,), 4, pad_slot=9)[0])
    assert (int(columns["seed_high"][0].view(np.uint32)) << 32) + int(columns["seed_low"][0].view(np.uint32)) == seed
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", 0.25)):
        assert columns[name][0].view(np.float32) == np.float32(value)
    assert (columns["top_k"][0], columns["top_logprobs"][0]) == (7, 2)
    assert columns["slots"].tolist() == [5, 9, 9, 9]


def test_pad_rows_are_greedy_and_truncate_nothing() -> None:
    columns = sampling_layout(2).unpack(pack_sampling((), 2, pad_slot=1)[0])
    assert columns["temperature"].view(np.float32).tolist() == [0.0, 0.0]
    assert columns["top_p"].view(np.float32).tolist() == [1.0, 1.0]
    assert columns["top_k"].tolist() == columns["min_p"].tolist() == columns["top_logprobs"].tolist() == [0, 0]


def test_all_tokens_are_kept_where_top_k_is_minus_one() -> None:
    columns = sampling_layout(1).unpack(pack_sampling((row_of(0, 3, top_k=-1),), 1, pad_slot=1)[0])
    assert columns["top_k"].tolist() == [0]


@pytest.mark.parametrize(("start", "count", "draw"), [(0, 3, 0), (2, 1, 0), (3, 1, 1), (0, 7, 4), (4, 3, 4)])
def test_a_draw_is_numbered_by_its_output_token_however_the_context_was_computed(
    start: int, count: int, draw: int
) -> None:
    columns = sampling_layout(1).unpack(pack_sampling((row_of(start, count),), 1, pad_slot=1)[0])
    assert columns["draw"].tolist() == [draw]


def test_targets_are_the_tokens_that_follow_in_the_prompt() -> None:
    scored, other = make_request([5, 6, 7, 8], prompt_logprobs=3), make_request([1, 2, 3])
    rows = (
        ScheduledRow(scored, 1, 3, samples=True, scores=True, slot=0),
        ScheduledRow(other, 0, 3, samples=True, scores=False, slot=1),
    )
    packed = pack_scoring(StepPlan(DeviceGroup(0, 1), (), rows), 32)[0]
    columns = scoring_layout(32).unpack(packed)
    targets = columns["targets"]
    assert targets[:4].tolist() == [7, 8, 0, 0]
    assert not targets[4:].any()
    assert columns["top_logprobs"].tolist() == [3, 3] + [0] * 30


@given(
    st.sampled_from((1, 4, 16, 48, 100)), st.sampled_from((1, 2, 8)), st.integers(1, 4096), st.sampled_from((1, 2, 4))
)
def test_a_table_holds_the_context_in_whole_chunks(block_size: int, kv_heads: int, max_len: int, tp: int) -> None:
    kv = KVCacheSpec(8, block_size, num_layers=1, kv_heads=kv_heads, head_dim=16, bytes_per_element=2)
    width, chunk = table_width(kv, max_len, tp), chunk_blocks(kv, tp)
    assert width % chunk == 0
    assert width * kv.block_tokens(tp) >= max_len
    assert (width - chunk) * kv.block_tokens(tp) < max_len
    assert chunk == 1 or chunk * kv.block_tokens(tp) <= CHUNK_TOKENS
