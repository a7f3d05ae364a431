"""Compiles the steps of an 8B Llama for a node of eight H200s, without a GPU, and prints what XLA made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

from fly_jax.platform import configure_deviceless_cuda

configure_deviceless_cuda()

from fly_jax.executables import StepKind  # noqa: E402  the platform is chosen above
from fly_jax.inspection import ProgramReport  # noqa: E402
from fly_jax.relayout_plan import HeadSplits  # noqa: E402
from tests.fly_jax.programs import check_in_place, check_relayout_in_place, shapes_of_8b  # noqa: E402
from tests.h200 import node_of_h200s  # noqa: E402

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


if __name__ == "__main__":
    main()
