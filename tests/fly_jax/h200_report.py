"""Compiles the steps of an 8B Llama for a node of eight H200s, without a GPU, and prints what XLA made of them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from fly_jax.platform import configure_deviceless_cuda

configure_deviceless_cuda()

from fly_jax.config import EngineConfig  # noqa: E402  the platform is chosen above
from fly_jax.device.executables import ProgramLowerer, ProgramShapes, compile_all  # noqa: E402
from fly_jax.device.meshes import DeviceMeshes  # noqa: E402
from fly_jax.device.program_memory import largest_keys, working_bytes  # noqa: E402
from fly_jax.engine.plan import fitting_blocks, weight_bytes  # noqa: E402
from fly_jax.inspection import ProgramReport  # noqa: E402
from fly_jax.kv.slabs import HeadSplits  # noqa: E402
from fly_jax.layout import all_groups  # noqa: E402
from fly_jax.scheduling.launch import StepKind  # noqa: E402
from fly_jax.scheduling.step import SchedulerLimits  # noqa: E402
from tests.fly_jax.programs import check_in_place, check_relayout_in_place, shapes_of_8b  # noqa: E402
from tests.h200 import H200, node_of_h200s  # noqa: E402

NUM_LAYERS = 32
# A copied pool or a copied set of weights would take gigabytes. A relayout between two wide degrees has 16 slabs of
# 1 MB for each of eight ranks, sent and received: 268 MB.
MAX_TEMPORARY_BYTES = 300 * 10**6


def main() -> None:
    devices = node_of_h200s()
    shapes = shapes_of_8b(NUM_LAYERS, max_tp=8, attention_backend="pallas")
    for tp in (1, 2, 4, 8):
        for kind in (StepKind.DECODE, StepKind.MIXED):
            print_report({"tp": tp, "kind": str(kind)}, partial(check_in_place, shapes, devices, tp, kind))
    for source_tp, target_tp in ((1, 2), (2, 1), (1, 8), (8, 1), (2, 8), (8, 4)):
        splits = HeadSplits(source_tp, target_tp)
        print_report(
            {"tp": max(source_tp, target_tp), "kind": f"relayout {splits}"},
            partial(check_relayout_in_place, shapes, devices, splits),
        )
    print(json.dumps(check_memory(devices)), flush=True)


def print_report(row: dict[str, object], compile_and_check: Callable[[], ProgramReport]) -> None:
    started = time.perf_counter()
    report = compile_and_check()
    assert report.temporary_bytes < MAX_TEMPORARY_BYTES
    figures = {
        "compile_seconds": round(time.perf_counter() - started, 1),
        "all_reduces": report.all_reduces,
        "aliased_bytes": report.aliased_bytes,
        "temporary_bytes": report.temporary_bytes,
        "argument_bytes": report.argument_bytes,
    }
    print(json.dumps({**row, **figures}), flush=True)


def check_memory(devices: Sequence[jax.Device]) -> dict[str, object]:
    """Plans the pools of an 8B model at the default options; they, weights and running programs must fit a card."""
    options = EngineConfig(model=Path("8B"))
    found = re.search(r"device_memory_size: (\d+)", H200)
    assert found is not None
    memory = int(int(found[1]) * options.gpu_memory_utilization)
    shapes = replace(
        shapes_of_8b(NUM_LAYERS, max_tp=8, attention_backend="pallas"),
        limits=SchedulerLimits(options.max_num_seqs, options.max_num_batched_tokens),
    )  # fmt: skip
    weights, block_bytes = weight_bytes(shapes.model, shapes.base_tp), shapes.kv.block_bytes
    first = _with_blocks(shapes, fitting_blocks(None, block_bytes, memory, weights, kept_free=0))
    kept_free = _working_bytes(first, devices)
    planned = _with_blocks(shapes, fitting_blocks(None, block_bytes, memory, weights, kept_free))
    pool = planned.kv.num_blocks * block_bytes
    working = _working_bytes(planned, devices)  # of the programs that serve, compiled for the pools as they will be
    assert weights + pool + working <= memory
    return {
        "tp": shapes.base_tp, "kind": "memory", "memory_bytes": memory, "weight_bytes": weights, "pool_bytes": pool,
        "kept_free_bytes": kept_free, "working_bytes": working,
    }  # fmt: skip


def _with_blocks(shapes: ProgramShapes, num_blocks: int) -> ProgramShapes:
    return replace(shapes, kv=replace(shapes.kv, num_blocks=num_blocks))


def _working_bytes(shapes: ProgramShapes, devices: Sequence[jax.Device]) -> int:
    keys = largest_keys(shapes, all_groups(shapes.num_devices, shapes.base_tp))
    lowerer, workers = ProgramLowerer(shapes, DeviceMeshes(devices, shapes.base_tp)), os.cpu_count() or 1
    table = compile_all(lowerer, keys, workers=workers, optimization_level=None, progress=lambda *_: None)
    return working_bytes(table.programs.values())


if __name__ == "__main__":
    main()
