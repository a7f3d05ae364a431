"""``kernels``: how near attention comes to what the device can do, beside other implementations of it."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fly_jax.bench import results, terminal
from fly_jax.bench.output_paths import check_file
from fly_jax.config import ATTENTION_BACKENDS
from fly_jax.errors import ConfigError
from fly_jax.platform import share_gpu_memory

if TYPE_CHECKING:
    import jax

    from fly_jax.bench.attention_work import Work
    from kernels_pallas.tuning import Tuning

# Targets on an H200.
DECODE_TARGET, PREFILL_TARGET = 0.85, 0.6
DECODE_TARGET_TOKENS, PREFILL_TARGET_CONTEXT = 65_536, 8192
# Longer prompts come in chunks of this many tokens.
PROMPT_CHUNK, LONGEST_WHOLE_PROMPT = 2048, 16_384
# Batch, context and new tokens of what tunings are compared on.
TUNED_WORK = ((1, 32_768, 1), (64, 2048, 1), (1, 8192, 8192))
# Share of the device's memory that a pool may take, beside others' contiguous copies.
POOL_SHARE = 0.25


@dataclass(frozen=True)
class Grid:
    """What is measured where nobody says otherwise.

    Attributes:
        contexts, batches: of decodes.
        prompts: contexts of prompts.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    copy_bytes: int
    matmul_width: int
    budget_seconds: float


_CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
ON_GPU = Grid(_CONTEXTS, (1, 8, 32, 128, 256), _CONTEXTS, 2 * 10**9, 8192, 0.1)
# A CPU takes seconds for what a GPU does in milliseconds; the point there is that everything runs.
ON_CPU = Grid((512, 2048), (1, 8), (512,), 256 * 10**6, 1024, 0.05)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times attention over a paged KV cache on one device: decodes (one new token a request) as a share of the "
        "bytes a second that the device copies, prompts (prefill) as a share of the FLOPs of a matrix product, both "
        "measured in the same run. Beside it stand plain JAX (xla) and, on contiguous keys and values, "
        "jax.nn.dot_product_attention and PyTorch's SDPA. Without a GPU it says so and times plain JAX. Try: python -m "
        "fly_jax.bench kernels --contexts 512 --batches 1 --degrees 1"
    )
    parser.set_defaults(command=run)
    for name, default, text in (
        ("contexts", None, "tokens that a request attends to (default: 512 to 131072; on CPU 512 and 2048)"),
        ("batches", None, "requests that decode at once (default: 1 to 256; on CPU 1 and 8)"),
        ("degrees", [1, 2, 4, 8], "sizes of a group (TP): one device's share of the heads is timed (default: 1 2 4 8)"),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", default=default, help=text)
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads of the model (default: %(default)s)")
    parser.add_argument("--group", type=int, default=4, help="query heads for each KV head (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="size of a head (default: %(default)s)")
    parser.add_argument(
        "--block-size", type=int, default=16, help="tokens of a KV block at TP 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help="pallas: our GPU kernels, which CPUs interpret; xla: plain JAX (default: auto, pallas on a GPU)",
    )
    parser.add_argument(
        "--tune", action="store_true", help="time settings of the kernels for their tuning table instead (GPU only)"
    )
    results.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        ConfigError: an option is wrong; one line that says what to do.
    """
    _check(options)
    share_gpu_memory()
    bench = _Bench(options)
    if options.tune and bench.backend != "pallas":
        raise ConfigError("--tune times kernels, and there is no GPU here to time them on: run it where there is one")
    console = terminal.console()
    if bench.backend == "xla":
        console.print("No GPU here, so the kernels are not timed: this is the XLA path on CPU.")
    rates = bench.rates()
    if options.tune:
        bench.tune(console, rates)
        return 0
    work, too_large = bench.work()
    rows = [bench.measure(each, rates) for each in track(work, "timing", console=Console(stderr=True))]
    _print(console, rows, rates)
    for each in too_large:
        console.print(f"left out, its KV does not fit {POOL_SHARE:.0%} of the memory: {each}")
    if options.save_result:
        found: dict[str, Any] = {"heads": asdict(bench.heads), "dtype": "bfloat16", "backend": bench.backend}
        found |= {**asdict(rates), "rows": [asdict(row) for row in rows], "left_out": [str(each) for each in too_large]}
        console.print(f"written to {results.save(options.result_dir, 'kernels', found)}")
    return 0


def _check(options: argparse.Namespace) -> None:
    numbers = {name: getattr(options, name) or () for name in ("contexts", "batches", "degrees")}
    numbers |= {name: (getattr(options, name),) for name in ("kv_heads", "group", "head_dim", "block_size")}
    for name, values in numbers.items():
        if min(values, default=1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    for degree in options.degrees:
        if options.kv_heads % degree:
            raise ConfigError(f"--kv-heads {options.kv_heads} cannot be divided among TP {degree}: leave it out")
    if options.save_result:
        check_file("--result-dir", options.result_dir / "kernels.json")


class _Bench:
    """Measures on the first device."""

    def __init__(self, options: argparse.Namespace) -> None:
        import jax

        from fly_jax.bench.attention_work import Heads, torch_on_gpu
        from kernels_pallas import default_backend

        self.options, self.device = options, jax.devices()[0]
        self.backend = default_backend(self.device) if options.backend == "auto" else options.backend
        self.grid = ON_GPU if self.device.platform == "gpu" else ON_CPU
        self.heads = Heads(options.kv_heads, options.group, options.head_dim)
        self.has_torch = torch_on_gpu()
        self._pool: tuple[Any, jax.Array] | None = None

    def rates(self) -> Rates:
        import jax.numpy as jnp

        from fly_jax.bench.timing import copy_bytes_per_second, matmul_flops_per_second

        grid = self.grid
        return Rates(
            copy_bytes_per_second(grid.copy_bytes, grid.budget_seconds),
            matmul_flops_per_second(grid.matmul_width, jnp.bfloat16, grid.budget_seconds),
        )

    def work(self) -> tuple[list[Work], list[Work]]:
        """Decodes of every batch and context, then prompts of every context, at every degree; those that do not fit."""
        options, grid, room = self.options, self.grid, self._pool_bytes()
        batches, contexts = options.batches or grid.batches, options.contexts or grid.contexts
        decodes = itertools.product(options.degrees, batches, contexts)
        prompts = itertools.product(options.degrees, options.contexts or grid.prompts)
        work = [self._one(tp, batch, context, 1) for tp, batch, context in decodes]
        for tp, context in prompts:
            work.append(self._one(tp, 1, context, context if context <= LONGEST_WHOLE_PROMPT else PROMPT_CHUNK))
        return [each for each in work if each.pool_bytes <= room], [each for each in work if each.pool_bytes > room]

    def measure(self, work: Work, rates: Rates) -> Row:
        from fly_jax.bench.attention_work import time_jax_contiguous, time_paged, time_torch_sdpa
        from kernels_pallas import attention_backend

        budget, pool = self.grid.budget_seconds, self._pool_of(work)
        seconds = {
            name: time_paged(work, attention_backend(name, self.device), pool, budget)
            for name in dict.fromkeys((self.backend, "xla"))
        }
        mine, amount = seconds[self.backend], self._amount(work)
        return Row(
            kind="decode" if work.queries == 1 else "prefill",
            tp=work.tp, batch=work.batch, context=work.context, queries=work.queries, backend=self.backend,
            us=mine * 1e6, rate=amount / mine, share=amount / mine / self._best(work, rates),
            xla_us=_us(seconds["xla"]),
            jax_us=_us(time_jax_contiguous(work, budget)),
            torch_us=_us(time_torch_sdpa(work, budget)) if self.has_torch else None,
        )  # fmt: skip

    def tune(self, console: Console, rates: Rates) -> None:
        """Times candidates for the tuning table on a long and on a crowded decode and on a prompt, at each degree."""
        from kernels_pallas.tuning import candidates

        chip = self.device.device_kind
        for tp, (batch, context, queries) in itertools.product(self.options.degrees, TUNED_WORK):
            work = self._one(tp, batch, context, queries)
            tunings = list(candidates(chip, work.layout(), self.heads.group, queries))
            timed = [(seconds, tuning) for tuning in tunings if (seconds := self._time_tuning(work, tuning))]
            console.print(f"{work}:")
            for seconds, tuning in sorted(timed, key=lambda each: each[0])[:5]:
                share = self._amount(work) / seconds / self._best(work, rates)
                console.print(f"  {seconds * 1e6:9.1f} us  {share:6.1%}  {tuning}")

    def _time_tuning(self, work: Work, tuning: Tuning) -> float | None:
        """Seconds a call; None where the chip has not the registers or the memory for it."""
        import jax

        from fly_jax.bench.attention_work import time_paged
        from kernels_pallas.pallas import PallasBackend

        backend = PallasBackend(self.device.device_kind, tuning=tuning)
        try:
            return time_paged(work, backend, self._pool_of(work), self.grid.budget_seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None

    @staticmethod
    def _amount(work: Work) -> int:
        """Bytes of a decode, FLOPs of a prompt."""
        return work.bytes_read if work.queries == 1 else work.flops

    @staticmethod
    def _best(work: Work, rates: Rates) -> float:
        return rates.copy_bytes_per_second if work.queries == 1 else rates.matmul_flops_per_second

    def _one(self, tp: int, batch: int, context: int, queries: int) -> Work:
        from fly_jax.bench.attention_work import Work

        return Work(self.heads, tp, self.options.block_size, batch, context, queries)

    def _pool_bytes(self) -> int:
        stats = self.device.memory_stats() or {}
        return int(POOL_SHARE * stats.get("bytes_limit", 4 * 10**9))

    def _pool_of(self, work: Work) -> jax.Array:
        """A pool of the work's shape; kept, since most pieces of work share a few shapes."""
        from fly_jax.bench.attention_work import random_pool

        # The size is rounded up to a power of two, so that one program serves several contexts.
        num_blocks = 1 << (work.num_blocks - 1).bit_length()
        if num_blocks * work.spec.block_bytes > self._pool_bytes():
            num_blocks = work.num_blocks
        key = (num_blocks, work.spec.block_elements)
        if self._pool is None or self._pool[0] != key:
            self._pool = None
            self._pool = (key, random_pool(num_blocks, replace(work.spec, num_blocks=num_blocks), work.dtype))
        return self._pool[1]


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _print(console: Console, rows: list[Row], rates: Rates) -> None:
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
