"""Compiles the steps of an 8B Llama for a node of eight H200s, without a GPU, and prints what XLA made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

from fly_jax.platform import configure_deviceless_cuda

configure_deviceless_cuda()

from jax.experimental import topologies  # noqa: E402  the platform is chosen above

from fly_jax.executables import StepKind  # noqa: E402
from fly_jax.inspection import ProgramReport  # noqa: E402
from fly_jax.relayout_plan import HeadSplits  # noqa: E402
from tests.fly_jax.programs import check_in_place, check_relayout_in_place, shapes_of_8b  # noqa: E402

NUM_LAYERS = 32
# A copied pool or a copied set of weights would take gigabytes. A relayout between two wide degrees has 16 slabs of
# 1 MB for each of eight ranks, sent and received: 268 MB.
MAX_TEMPORARY_BYTES = 300 * 10**6
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""


def main() -> None:
    node = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x8", target_config=H200)
    shapes = shapes_of_8b(NUM_LAYERS, max_tp=8, attention_backend="pallas")
    for tp in (1, 2, 4, 8):
        for kind in (StepKind.DECODE, StepKind.MIXED):
            print_report({"tp": tp, "kind": str(kind)}, partial(check_in_place, shapes, node.devices, tp, kind))
    for source_tp, target_tp in ((1, 2), (2, 1), (1, 8), (8, 1), (2, 8), (8, 4)):
        splits = HeadSplits(source_tp, target_tp)
        print_report(
            {"tp": max(source_tp, target_tp), "kind": f"relayout {splits}"},
            partial(check_relayout_in_place, shapes, node.devices, splits),
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
