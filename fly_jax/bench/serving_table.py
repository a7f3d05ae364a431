"""The table of a load run, with the headings that users of ``vllm bench serve`` know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fly_jax.bench.metrics import percent_text

WIDTH = 50
HEADINGS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
COUNTS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Maximum request concurrency:", "max_concurrency"),
    ("Request rate configured (RPS):", "request_rate"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)


def table(result: dict[str, Any], shown: Sequence[str], percentiles: Sequence[float]) -> str:
    """The text of a result.

    Args:
        shown: latencies to show, such as ``ttft``.
        percentiles: of these.
    """
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    # Those that were not asked for, a bound or limits, are None.
    lines += [_line(heading, result[key]) for heading, key in COUNTS if result[key] not in (None, "inf")]
    for name in shown:
        short, title = HEADINGS[name]
        lines.append(title.center(WIDTH, "-"))
        of_percents = ((f"P{each}", f"p{each}") for each in map(percent_text, percentiles))
        for heading, key in (("Mean", "mean"), ("Median", "median"), *of_percents):
            # Where nothing was answered they are 0, which would be the fastest.
            figure = result[f"{key}_{name}_ms"] if result["completed"] else "-"
            lines.append(_line(f"{heading} {short} (ms):", figure))
    if result["layout_timeline"]:
        lines.append("Layouts".center(WIDTH, "-"))
        lines.append(_line("First layout:", result["layout_timeline"][0]["layout"]))
        lines.append(_line("Layout switches:", result["layout_switches"]))
        if result["switch_stall_ms"]:
            lines.append(_line("Worst stall across a switch (ms):", max(result["switch_stall_ms"])))
    lines.append("Client".center(WIDTH, "-"))
    lines.append(_line("P99 schedule lag (ms):", result["schedule_lag_ms"]["p99"]))
    lines.append(_line("CPU time per output token (us):", result["client_cpu_us_per_token"]))
    return "\n".join([*lines, "=" * WIDTH])


def _line(heading: str, value: Any) -> str:
    return f"{heading:<40} {f'{value:.2f}' if isinstance(value, float) else value:<9}".rstrip()
