"""What ``kernels`` found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

# Targets on an H200.
DECODE_TARGET, PREFILL_TARGET = 0.85, 0.6
DECODE_TARGET_TOKENS, PREFILL_TARGET_CONTEXT = 65_536, 8192


@dataclass(frozen=True)
class Rates:
    """What the device does at best, measured in the same run."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


@dataclass(frozen=True)
class Row:
    """One measurement. Times in microseconds a layer; None: not measured.

    Attributes:
        rate: bytes of KV a second (decode) or FLOPs a second (prefill).
        share: of the copy's bytes a second, or of the matrix product's FLOPs.
        xla_us: the backend of plain JAX.
        jax_us, torch_us: ``jax.nn.dot_product_attention`` and PyTorch's SDPA on contiguous keys and values.
    """

    kind: str
    tp: int
    batch: int
    context: int
    queries: int
    backend: str
    us: float
    rate: float
    share: float
    xla_us: float | None
    jax_us: float | None
    torch_us: float | None


def print_rows(console: Console, rows: list[Row], rates: Rates) -> None:
    copied, product = rates.copy_bytes_per_second / 1e9, rates.matmul_flops_per_second / 1e12
    console.print(
        f"copy on the device: {copied:,.0f} GB/s read and written; bf16 matrix product: {product:,.2f} TFLOP/s"
    )
    for kind, unit, scale in (("decode", "GB/s", 1e9), ("prefill", "TFLOP/s", 1e12)):
        table = Table(title=f"{kind}, microseconds a layer")
        for heading in ("TP", "batch", "context", "new", "backend", "us", unit, "share", "xla", "jax.nn", "torch SDPA"):
            table.add_column(heading, justify="right")
        for row in (each for each in rows if each.kind == kind):
            table.add_row(
                *(f"{each:,}" for each in (row.tp, row.batch, row.context, row.queries)), row.backend,
                f"{row.us:,.1f}", f"{row.rate / scale:,.2f}", f"{row.share:.1%}",
                *(_cell(us) for us in (row.xla_us, row.jax_us, row.torch_us)),
            )  # fmt: skip
        console.print(table)
    if any(row.backend == "pallas" for row in rows):
        for line in verdicts(rows):
            console.print(line)


def _cell(us: float | None) -> str:
    return "-" if us is None else f"{us:,.1f}"


def verdicts(rows: list[Row]) -> list[str]:
    """How many measurements reach each target."""
    decodes = [r for r in rows if r.kind == "decode" and r.batch * r.context >= DECODE_TARGET_TOKENS]
    prefills = [r for r in rows if r.kind == "prefill" and r.context == PREFILL_TARGET_CONTEXT]
    against = [r for r in rows if r.torch_us is not None]
    return [
        f"decode of {DECODE_TARGET_TOKENS:,} tokens and more at {DECODE_TARGET:.0%} of the copy's rate: "
        f"{sum(r.share >= DECODE_TARGET for r in decodes)} of {len(decodes)}",
        f"prefill of {PREFILL_TARGET_CONTEXT:,} tokens at {PREFILL_TARGET:.0%} of the matrix product's rate: "
        f"{sum(r.share >= PREFILL_TARGET for r in prefills)} of {len(prefills)}",
        f"not slower than torch SDPA: {sum(r.us <= (r.torch_us or 0) for r in against)} of {len(against)}",
    ]
