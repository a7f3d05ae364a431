"""The compiled relayout program against what each request's tables say its pools hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax
import numpy as np
import pytest

from fly_jax.device.device_arrays import BY_RANK
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.relayout import CHUNK_SLABS, pack_exchange, relayout
from fly_jax.inspection import ProgramReport
from fly_jax.kv.blocks import BlockTable, KVCacheManager, KVCacheSpec
from fly_jax.kv.slabs import HeadSplits, exchange_rounds, slab_moves
from fly_jax.layout import DeviceGroup

NUM_DEVICES, NUM_BLOCKS, SLOTS = 4, 150, 13
PAIRS = [
    (base_tp, HeadSplits(source, target))
    for base_tp, source, target in product((1, 2), (1, 2, 4), (1, 2, 4))
    if source != target and min(source, target) >= base_tp
]


@dataclass
class MovedRequest:
    """Where a request's KV was and goes, and its bits ``[tokens, layers, 2, kv_heads, head_dim]``."""

    source: BlockTable
    target: BlockTable
    content: np.ndarray


class Devices:
    """Pools full of garbage, with requests in them, on the host: what a relayout should make of them.

    Attributes:
        pools: ``[devices, blocks, elements]``.
        tokens: each device's table of latest tokens.
        group: the wider of the groups concerned.
    """

    def __init__(self, kv_heads: int, base_tp: int, splits: HeadSplits, dtype: type) -> None:
        self.spec = KVCacheSpec(NUM_BLOCKS, 4, 2, kv_heads, head_dim=8, bytes_per_element=np.dtype(dtype).itemsize)
        self.kv = KVCacheManager(self.spec, NUM_DEVICES, base_tp)
        self.splits, self.base_tp = splits, base_tp
        wide = max(splits.source_tp, splits.target_tp)
        self.group = DeviceGroup(NUM_DEVICES - wide, wide)  # the last one: rank and device are not the same
        self.ranked = self.group.rank_order(base_tp)
        self.random = np.random.default_rng(kv_heads)
        shape = (NUM_DEVICES, NUM_BLOCKS, self.spec.block_elements)
        self.pools = self._bits(shape, dtype)
        self.tokens = self._bits((NUM_DEVICES, SLOTS), np.int32)
        for device, allocator in enumerate(self.kv.allocators):
            held = allocator.allocate(NUM_BLOCKS)  # ids come in an order of their own on each device
            allocator.free(np.random.default_rng(device).permutation(held).tolist())
        self.requests = [self._place(index, tokens) for index, tokens in enumerate(self._token_counts())]

    def _bits(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        limits = np.iinfo(dtype)
        return self.random.integers(limits.min, limits.max, shape, dtype, endpoint=True)

    def _token_counts(self) -> Iterator[int]:
        """Around the borders of a block at both degrees, and more slabs than one launch moves."""
        for tp in (self.splits.source_tp, self.splits.target_tp):
            block_tokens = self.spec.block_tokens(tp)
            yield from (1, block_tokens - 1, block_tokens, block_tokens + 1)
        narrow_block = min(self.spec.block_tokens(tp) for tp in (self.splits.source_tp, self.splits.target_tp))
        yield (CHUNK_SLABS + 2) * narrow_block + 1
        yield CHUNK_SLABS * narrow_block

    def _place(self, index: int, tokens: int) -> MovedRequest:
        source, target = (self._table(index + side, tp, tokens) for side, tp in enumerate(self._degrees))
        shape = (tokens, self.spec.num_layers, 2, self.spec.kv_heads, self.spec.head_dim)
        request = MovedRequest(source, target, self._bits(shape, self.pools.dtype.type))
        for view, part in self._views(self.pools, source, request.content):
            view[:] = part
        return request

    @property
    def _degrees(self) -> tuple[int, int]:
        return self.splits.source_tp, self.splits.target_tp

    def _table(self, index: int, tp: int, tokens: int) -> BlockTable:
        groups = self.group.num_devices // tp
        table = self.kv.new_table(DeviceGroup(self.group.start + index % groups * tp, tp))
        assert self.kv.grow(table, tokens)
        return table

    def _views(
        self, pools: np.ndarray, table: BlockTable, content: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each piece of the pools that a table names, beside what belongs there."""
        tp = table.group.tp
        block_tokens, heads = self.spec.block_tokens(tp), self.spec.local_kv_heads(tp)
        for rank, device in enumerate(table.group.rank_order(self.base_tp)):
            first = self.spec.first_kv_head(tp, rank)
            for position, token in enumerate(content):
                block = pools[device, table.rows[rank][position // block_tokens]].reshape(self.spec.block_shape(tp))
                yield block[:, :, :, position % block_tokens], token[:, :, first : first + heads]

    def assert_moved(self, pools: np.ndarray) -> None:
        """Every request is whole in its new blocks, and no other block of any device has changed."""
        for request in self.requests:
            for view, part in self._views(pools, request.target, request.content):
                np.testing.assert_array_equal(view, part)
        untouched = np.ones((NUM_DEVICES, NUM_BLOCKS), bool)
        for request in self.requests:
            devices = request.target.group.rank_order(self.base_tp)
            for device, row in zip(devices, request.target.rows, strict=True):
                untouched[device, row] = False
        assert untouched.any(axis=1).all()
        np.testing.assert_array_equal(pools[untouched], self.pools[untouched])


class Program:
    """The compiled relayout of a group of real devices."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.meshes = DeviceMeshes(jax.devices()[:NUM_DEVICES], devices.base_tp)
        move = relayout(devices.spec, devices.splits, SLOTS, self.meshes.mesh(devices.group))
        self.pool, self.tables = self._put(devices.pools), self._put(devices.tokens[:, None])
        packed = jax.device_put(self._pack([], {}), self.meshes.sharding(devices.group, BY_RANK))
        self.compiled = jax.jit(move, donate_argnums=(0, 1)).lower(self.pool, self.tables, packed).compile()

    def run(self, token_devices: dict[int, int]) -> int:
        """Moves every request; returns the number of launches."""
        spec, base_tp = self.devices.spec, self.devices.base_tp
        moves = [
            move
            for request in self.devices.requests
            for move in slab_moves(spec, base_tp, request.source, request.target, range(len(request.content)))
        ]
        rounds = list(exchange_rounds(moves, CHUNK_SLABS))
        for round_moves in rounds:
            self._launch(self._pack(round_moves, token_devices))
        return len(rounds)

    def launch_empty(self) -> None:
        self._launch(self._pack([], {}))

    @property
    def pools(self) -> np.ndarray:
        return self._get(self.pool, self.devices.pools)

    @property
    def tokens(self) -> np.ndarray:
        return self._get(self.tables, self.devices.tokens)

    def _launch(self, packed: np.ndarray) -> None:
        self.pool, self.tables = self.compiled(self.pool, self.tables, packed)

    def _pack(self, moves: list, token_devices: dict[int, int]) -> np.ndarray:
        return pack_exchange(moves, self.devices.ranked, token_devices, SLOTS, NUM_BLOCKS)

    def _put(self, by_device: np.ndarray) -> jax.Array:
        rows = np.concatenate([by_device[device] for device in self.devices.ranked])
        # may_alias=False: it is donated, and the host's copy must stay as it is.
        return jax.device_put(rows, self.meshes.sharding(self.devices.group, BY_RANK), may_alias=False)

    def _get(self, array: jax.Array, before: np.ndarray) -> np.ndarray:
        """All devices' rows again, those outside the group as before."""
        after = before.copy()
        rows = np.asarray(array).reshape(len(self.devices.ranked), *before.shape[1:])
        for device, own in zip(self.devices.ranked, rows, strict=True):
            after[device] = own
        return after


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize(("base_tp", "splits"), PAIRS, ids=str)
def test_requests_of_any_length_are_whole_in_their_new_blocks(base_tp: int, splits: HeadSplits, kv_heads: int) -> None:
    devices = Devices(kv_heads, base_tp, splits, np.uint16)
    program = Program(devices)
    assert program.run({}) > 1
    devices.assert_moved(program.pools)
    np.testing.assert_array_equal(program.tokens, devices.tokens)


@pytest.mark.parametrize("splits", [HeadSplits(1, 4), HeadSplits(4, 2)], ids=str)
def test_pools_of_32_bit_elements_move_too(splits: HeadSplits) -> None:
    devices = Devices(4, 1, splits, np.uint32)
    program = Program(devices)
    program.run({})
    devices.assert_moved(program.pools)


@pytest.mark.parametrize(("base_tp", "splits"), PAIRS, ids=str)
def test_latest_tokens_reach_every_device_of_the_group_and_other_slots_stay(base_tp: int, splits: HeadSplits) -> None:
    devices = Devices(4, base_tp, splits, np.uint16)
    program, group = Program(devices), devices.group
    token_devices = {slot: group.start + slot % group.num_devices for slot in range(0, SLOTS, 2)}
    assert program.run(token_devices) > 1  # every launch of a relayout carries them
    expected = devices.tokens.copy()
    for slot, device in token_devices.items():
        expected[group.device_indices, slot] = devices.tokens[device, slot]
    np.testing.assert_array_equal(program.tokens, expected)


@pytest.mark.parametrize(("base_tp", "splits"), PAIRS, ids=str)
def test_pools_and_token_tables_are_written_in_place(base_tp: int, splits: HeadSplits) -> None:
    devices = Devices(4, base_tp, splits, np.uint16)
    report = ProgramReport.of(Program(devices).compiled)
    assert report.aliased_bytes == NUM_BLOCKS * devices.spec.block_bytes + 4 * SLOTS
    assert report.new_arrays(NUM_BLOCKS * devices.spec.block_elements) == []


def test_a_launch_without_moves_changes_nothing() -> None:
    devices = Devices(4, 1, HeadSplits(1, 4), np.uint16)
    program = Program(devices)
    program.launch_empty()
    np.testing.assert_array_equal(program.pools, devices.pools)
    np.testing.assert_array_equal(program.tokens, devices.tokens)
