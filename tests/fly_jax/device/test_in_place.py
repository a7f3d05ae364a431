"""Compiled steps write the KV pool in place and never copy a weight: on CPU, and for a node of H200s."""

from __future__ import annotations

from itertools import permutations

import jax
import pytest

from fly_jax.device.relayout import CHUNK_SLABS
from fly_jax.kv.slabs import HeadSplits
from fly_jax.scheduling.launch import StepKind
from tests.fly_jax.programs import check_head_copies_no_weight, check_in_place, check_relayout_in_place, shapes_of_8b
from tests.h200 import run_report


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_steps_run_in_place_on_cpu(tp: int, kind: StepKind) -> None:
    shapes = shapes_of_8b(num_layers=2, max_tp=4)
    report = check_in_place(shapes, jax.devices()[:4], tp, kind)
    if kind is StepKind.DECODE:
        # Activations of eight rows are far smaller than any weight, so no weight-sized temporary hides in the total.
        smallest = min(p.nbytes for p in shapes.model.decoder.parameters if p.sharded) // tp
        assert report.temporary_bytes < smallest


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StepKind.HEAD, StepKind.SCORE])
@pytest.mark.parametrize("tp", [1, 4])
def test_heads_copy_no_weight_on_cpu(tp: int, kind: StepKind) -> None:
    check_head_copies_no_weight(shapes_of_8b(num_layers=1, max_tp=4), jax.devices()[:4], tp, kind)


@pytest.mark.parametrize(("source_tp", "target_tp"), list(permutations((1, 2, 4), 2)))
def test_relayouts_run_in_place_on_cpu(source_tp: int, target_tp: int) -> None:
    shapes, splits = shapes_of_8b(num_layers=2, max_tp=4), HeadSplits(source_tp, target_tp)
    report = check_relayout_in_place(shapes, jax.devices()[:4], splits)
    # What is sent and what is received, and again as the all-to-all lays them out.
    exchanged = max(source_tp, target_tp) * CHUNK_SLABS * shapes.kv.slab_bytes(source_tp, target_tp)
    assert report.temporary_bytes < 5 * exchanged


@pytest.mark.h200
def test_steps_run_in_place_on_a_node_of_h200s() -> None:
    reports = run_report("tests.fly_jax.h200_report")
    steps = {(tp, kind) for tp in (1, 2, 4, 8) for kind in ("decode", "mixed")}
    assert steps <= {(r["tp"], r["kind"]) for r in reports}
    assert sum(r["kind"].startswith("relayout") for r in reports) == 6
    (memory,) = (r for r in reports if r["kind"] == "memory")
    assert memory["weight_bytes"] + memory["pool_bytes"] + memory["working_bytes"] <= memory["memory_bytes"]
