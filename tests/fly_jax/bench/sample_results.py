"""Made-up results in the form that benchmarks write; they are for tests of pictures and reports only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PROVENANCE = {
    "date": "2026-01-02 03:04 UTC", "fly_jax": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "python": "3.11.7",
    "device_kind": "cpu", "num_devices": 4, "host": "x86_64, 2 cores",
}  # fmt: skip
DURATION = 60.0
BURST = (20.0, 35.0)


def serve_result(seed: int = 0, rate: float = 4.0, **changed: Any) -> dict[str, Any]:
    """A serving run in layout 1+1+1+1 whose requests come faster in the middle."""
    random = np.random.default_rng(seed)
    quiet, burst = random.uniform(0, DURATION, int(rate * DURATION)), random.uniform(*BURST, int(rate * 60))
    starts = sorted([*quiet.tolist(), *burst.tolist()])
    ttfts, tpots = random.gamma(2.0, 0.02 * rate, len(starts)), random.gamma(9.0, 0.002, len(starts))
    latencies = {**latency_keys("ttft", ttfts), **latency_keys("tpot", tpots)}
    return {
        **PROVENANCE,
        "backend": "openai", "model_id": "demo", "num_prompts": len(starts), "request_rate": rate, "burstiness": 1.0,
        "duration": DURATION + 1.5, "completed": len(starts), "failed": 0, "request_throughput": len(starts) / 61.5,
        "request_goodput": len(starts) / 80, "output_throughput": 100.0 * rate, "total_token_throughput": 300.0 * rate,
        **latencies,
        "start_times": starts, "ttfts": ttfts.tolist(), "workload": "burst", "seed": seed,
        "layout_timeline": [{"at": 0.0, "layout": "1+1+1+1"}], "layout_switches": 0, "switch_stall_ms": [],
        "schedule_lag_ms": {"p50": 0.2, "p99": 1.5, "max": 3.0}, "by_tag": {"low": latencies, "high": latencies},
        **changed,
    }  # fmt: skip


def latency_keys(metric: str, seconds: np.ndarray[Any, Any]) -> dict[str, float]:
    found = {f"p{percent}_{metric}_ms": float(1e3 * np.percentile(seconds, percent)) for percent in (50, 90, 99)}
    return {f"mean_{metric}_ms": float(1e3 * seconds.mean()), f"median_{metric}_ms": found[f"p50_{metric}_ms"], **found}


def switching_run(**changed: Any) -> dict[str, Any]:
    """Wide, narrow in the burst, wide again."""
    timeline = [{"at": 0.0, "layout": "4"}, {"at": 21.0, "layout": "1+1+1+1"}, {"at": 36.5, "layout": "2+2"}]
    run = {"policy": "auto", "strategy": "migrate", "layout": "4"}
    found = {**run, "layout_timeline": timeline, "layout_switches": 2, "switch_stall_ms": [48.0, 31.0]}
    return serve_result(9, **{**found, **changed})


def sweep_result(rates: Sequence[float] = (4.0,)) -> dict[str, Any]:
    """Three pinned layouts and the policy, at each rate."""
    layouts = ("1+1+1+1", "2+2", "4")
    runs = []
    for rate in rates:
        for index, layout in enumerate(layouts):
            pinned = {"layout": layout, "policy": "static", "strategy": "migrate"}
            runs.append(serve_result(index, rate, **pinned, layout_timeline=[{"at": 0.0, "layout": layout}]))
        runs.append({**switching_run(), **latency_keys("ttft", np.full(3, 0.03 * rate)), "request_rate": rate})
    return {**PROVENANCE, "workload": "burst", "runs": runs}
