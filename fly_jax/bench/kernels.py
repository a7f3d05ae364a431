"""``kernels``: how near attention comes to what the device can do, beside other implementations of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track

from fly_jax.bench import results, terminal
from fly_jax.bench.kernel_results import Row, print_rows
from fly_jax.bench.output_paths import check_file
from fly_jax.config import ATTENTION_BACKENDS
from fly_jax.errors import ConfigError
from fly_jax.platform import share_gpu_memory

# What attention can be timed beside: plain JAX over the same blocks, and two over contiguous keys and values.
BESIDE = ("xla", "jax", "torch")


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
        "--beside", nargs="*", choices=BESIDE, default=list(BESIDE), metavar="NAME",
        help=f"what else is timed, of {', '.join(BESIDE)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--tune", action="store_true", help="time settings of the kernels for their tuning table instead (GPU only)"
    )
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="with --tune: only the first settings, likeliest first (default: all)",
    )
    results.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        ConfigError: an option is wrong; one line that says what to do.
    """
    _check(options)
    share_gpu_memory()
    from fly_jax.bench.kernel_timing import POOL_SHARE, Bench  # jax comes with it: only once that is said

    bench = Bench(options)
    if options.tune and bench.backend != "pallas":
        raise ConfigError("--tune times kernels, and there is no GPU here to time them on: run it where there is one")
    console = terminal.console()
    if bench.backend == "xla":
        console.print("No GPU here, so the kernels are not timed: this is the XLA path on CPU.")
    rates = bench.rates()
    if options.tune:
        from fly_jax.bench.kernel_tuning import tune

        tune(bench, console, rates)
        return 0
    work, too_large = bench.work()
    rows: list[Row] = []
    failed: list[str] = []
    for row in track(bench.measured(work, rates, failed), "timing", total=len(work), console=Console(stderr=True)):
        rows.append(row)
        if options.save_result:  # as they come: a run that is cut short leaves what it had
            found: dict[str, Any] = {"heads": asdict(bench.heads), "dtype": "bfloat16", "backend": bench.backend}
            found |= {**asdict(rates), "rows": [asdict(each) for each in rows], "failed": failed}
            found["left_out"] = [str(each) for each in too_large]
            results.save(options.result_dir, "kernels", found)
    print_rows(console, rows, rates)
    for each in too_large:
        console.print(f"left out, its KV does not fit {POOL_SHARE:.0%} of the memory: {each}")
    for line in failed:
        console.print(f"failed: {line}")
    if options.save_result and rows:
        console.print(f"written to {options.result_dir / 'kernels.json'}")
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    numbers = {name: getattr(options, name) or () for name in ("contexts", "batches", "degrees")}
    numbers |= {name: (getattr(options, name),) for name in ("kv_heads", "group", "head_dim", "block_size")}
    numbers["candidates"] = () if options.candidates is None else (options.candidates,)
    for name, values in numbers.items():
        if min(values, default=1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    for degree in options.degrees:
        if options.kv_heads % degree:
            raise ConfigError(f"--kv-heads {options.kv_heads} cannot be divided among TP {degree}: leave it out")
    if options.save_result:
        check_file("--result-dir", options.result_dir / "kernels.json")
