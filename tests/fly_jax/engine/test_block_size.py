"""After a switch, every row is laid out in blocks of the size that its new group's programs use.

A system of this kind once kept the old size on one rank after going from two devices to four. Nothing failed and greedy
texts were the same, but the text's likelihood was wrong. So the slots of every upload are computed again here.
"""

from __future__ import annotations

from itertools import product

import pytest

from fly_jax.device.packing import pack_step
from fly_jax.outputs import SwitchStrategy
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.step import StepPlan
from tests.fly_jax.slot_arithmetic import Upload
from tests.fly_jax.traffic import Traffic, send, switched


class Recorder:
    """An engine whose uploads are checked when they are launched, for right and for stale block sizes."""

    def __init__(self, strategy: SwitchStrategy, *, kv_heads: int = 4, base_tp: int = 1) -> None:
        layouts = ("1+1+1+1", "2+2", "4", "2+2") if base_tp == 1 else ("2+2", "4", "2+2")
        self.traffic = Traffic(
            layout=layouts[0], base_tp=base_tp, kv_heads=kv_heads, max_num_batched_tokens=64, patience=20
        )
        self.wrong: dict[int, dict[int, int]] = {}
        self.checked = 0
        self.traffic.runner.on_pack = self._check
        for i in range(10):
            send(self.traffic, [1 + i] * (3 + 9 * i), max_tokens=60)
        for layout in layouts[1:]:
            self.traffic.step(6)
            switched(self.traffic, layout, strategy)
        self.traffic.finish()

    def _check(self, plan: StepPlan, launch: Launch) -> None:
        kv, tp = self.traffic.kv, plan.group.tp
        upload = Upload.of(plan, launch, self.traffic.runner.shapes)
        assert sorted(upload.positions()) == sorted(
            position for row in plan.rows for position in range(row.start, row.start + row.count)
        )
        for size in {kv.spec.block_tokens(other) for other in (1, 2, 4)}:
            self.wrong.setdefault(kv.spec.block_tokens(tp), {}).setdefault(size, 0)
            self.wrong[kv.spec.block_tokens(tp)][size] += len(upload.wrong_slots(size))
        self.checked += len(plan.rows)


@pytest.mark.parametrize(("base_tp", "kv_heads"), [(1, 4), (1, 2), (2, 4)])
@pytest.mark.parametrize("strategy", SwitchStrategy)
def test_slots_are_those_of_the_groups_block_size_after_every_kind_of_switch(
    strategy: SwitchStrategy, base_tp: int, kv_heads: int
) -> None:
    recorder = Recorder(strategy, kv_heads=kv_heads, base_tp=base_tp)
    assert recorder.checked > 100
    for size, found in recorder.wrong.items():
        assert found[size] == 0


@pytest.mark.parametrize(("size", "stale"), [pair for pair in product((4, 8, 16), repeat=2) if pair[0] != pair[1]])
def test_a_stale_block_size_would_be_seen(size: int, stale: int) -> None:
    """The same uploads, read with the size of another degree."""
    recorder = Recorder(SwitchStrategy.MIGRATE)
    assert recorder.wrong[size][stale] > 20


def test_a_stale_size_on_one_rank_alone_would_be_seen() -> None:
    """A table that is one old block short on the last rank."""
    traffic = Traffic(layout="4")
    send(traffic, [1] * 40)
    traffic.step(2)
    plan, shapes = traffic.runner.plans[-1], traffic.runner.shapes
    upload = Upload.of(plan, pack_step(plan, shapes), shapes)
    assert upload.wrong_slots(16) == []
    blocks = plan.rows[0].request.held_table.num_blocks
    upload.fields["tables"][3, 0, blocks - 1] += 1
    assert len(upload.wrong_slots(16)) == 1
