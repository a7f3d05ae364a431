"""The options of the ``fly-jax`` commands, by group; what a command does with them is in ``cli``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from fly_jax.config import ATTENTION_BACKENDS, DTYPES, LOAD_FORMATS, POLICIES, SCHEDULING_POLICIES
from fly_jax.outputs import SwitchStrategy
from fly_jax.platform import DEFAULT_DEVICES

LOAD_FORMAT_HELP = "dummy: random weights from config.json alone, to measure speed without a download (default: auto)"
STRATEGIES = tuple(strategy.value for strategy in SwitchStrategy)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _origins(text: str) -> tuple[str, ...]:
    """vLLM's JSON list of origins, or one origin."""
    try:
        origins = json.loads(text) if text.startswith("[") else [text]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    for origin in origins:
        # A browser sends neither a path nor a last slash: such an origin would never be one that asks.
        if not isinstance(origin, str) or not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise argparse.ArgumentTypeError(
                f"{origin!r} is not an origin: write '*' or one such as https://example.com"
            )
    return tuple(origins)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    server.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="keys, one of which /v1 asks for (default: $FLY_JAX_API_KEY)",
    )
    server.add_argument("--admin-key", help="key that changing the layout asks for (default: $FLY_JAX_ADMIN_KEY)")
    server.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names of the model in requests, the first also in answers (default: the folder's)",
    )
    server.add_argument(
        "--allowed-origins",
        type=_origins,
        default=(),
        help="web pages that may read answers (CORS): a JSON list of origins, or one origin; '*': all (default: none)",
    )
    server.add_argument(
        "--limit-concurrency",
        type=int,
        default=2048,
        help="connections open at once; one more is told so and closed, unless it asks for /health "
        "(default: %(default)s)",
    )
    for name, seconds, what in (
        ("keep-alive", 5, "that a connection may be idle between two requests"),
        ("headers", 10, "until the headers of a request are complete"),
        ("body", 30, "until its body is complete, and as many again whenever 16 KiB/s have come"),
        ("reading", 60, "for which a client may read nothing of an answer that waits for it"),
    ):
        server.add_argument(
            f"--timeout-{name}", type=float, default=seconds, help=f"seconds {what} (default: %(default)s)"
        )
    server.add_argument(
        "--shutdown-timeout", type=int, default=10, help="seconds that open requests get to end (default: %(default)s)"
    )


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", action="append", help="may be repeated; without it: one a line from stdin")
    sampling.add_argument("--max-tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0, top_k and min_p are those of --generation-config (default: 0, the most likely token)",
    )
    sampling.add_argument("--top-p", type=float, help="(default: that of --generation-config)")
    sampling.add_argument("--request-seed", type=int, help="the same seed gives the same tokens")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_folder", type=Path, metavar="HF_DIR")
    parser.add_argument("out_folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--max-tp", type=int, default=8, help="widest TP degree to serve it at (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="a running server (default: start one with the bundled model)")
    parser.add_argument("--requests", type=int, default=24, help="requests in flight at each layout")
    parser.add_argument("--admin-key", help="the server's admin key, if it has one")
    parser.add_argument("--switch-strategy", choices=STRATEGIES, help="how its switches treat requests in flight")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a Hugging Face folder or a converted one")
    _add_layout_options(parser)
    _add_engine_limits(parser)


def _add_layout_options(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout")
    layout.add_argument("--devices", type=int, help=f"devices to use (default: all; on CPU {DEFAULT_DEVICES} virtual)")
    layout.add_argument("--layout", help="first layout: 2+2, 2+1+1, dp4, tp4, dp2xtp2 (default: narrowest)")
    layout.add_argument(
        "--layouts",
        type=lambda text: tuple(text.split(",")),
        help="compile only these, by commas, and the first layout (default: all)",
    )
    layout.add_argument("--tensor-parallel-size", "-tp", type=int, help="uniform first layout of this TP degree")
    layout.add_argument("--data-parallel-size", "-dp", type=int, help="uniform first layout of this many groups")
    layout.add_argument("--base-tp", type=int, help="smallest TP degree that holds the model (default: from memory)")
    layout.add_argument(
        "--policy",
        choices=POLICIES,
        default="auto",
        help="who chooses the layout while it runs: auto (the same as load_adaptive) follows the load; static keeps "
        "the first one until you ask for another. '--layout 2+2 --policy static' pins a layout (default: %(default)s)",
    )
    layout.add_argument(
        "--switch-strategy",
        choices=STRATEGIES,
        default=SwitchStrategy.MIGRATE.value,
        help="what becomes of running requests when the layout changes: migrate moves their KV and they go on at "
        "once; sequential lets them end first; soft_preempt too, but runs waiting ones on idle groups meanwhile; "
        "hard_preempt pauses them until their group is back, the groups in its place are idle, or they have waited "
        "long (default: %(default)s)",
    )


def _add_engine_limits(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="auto keeps the checkpoint's")
    engine.add_argument("--load-format", choices=LOAD_FORMATS, default="auto", help=LOAD_FORMAT_HELP)
    engine.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|FOLDER",
        help="sampling options of requests that set none: auto: those of the model's generation_config.json; vllm: "
        "temperature 1 and no truncation; or the folder of another such file (default: %(default)s)",
    )
    engine.add_argument(
        "--override-generation-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""fields to take instead of that file's, such as '{"temperature": 0.7, "max_new_tokens": 512}'""",
    )
    engine.add_argument("--max-model-len", type=int, help="context limit in tokens (default: the model's)")
    engine.add_argument(
        "--max-num-seqs", type=int, default=32, help="requests running at once in a group (default: %(default)s)"
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=int, default=512, help="tokens in one step of a group (default: %(default)s)"
    )
    engine.add_argument(
        "--max-num-queued-reqs", type=int, default=1024, help="requests waiting before 503 (default: %(default)s)"
    )
    engine.add_argument(
        "--max-queued-per-client",
        type=int,
        help="of them, requests of one client (a key where there are several, else an address) before 429 "
        "(default: half of them)",
    )
    engine.add_argument(
        "--allow-request-width",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="requests may set 'tensor_parallel_size', for which the layout changes; --no-: those above 1 are refused "
        "(default: allowed)",
    )
    engine.add_argument(
        "--engine-timeout",
        type=float,
        default=60.0,
        help="seconds without a finished step, while there is work, after which /health says 503; longer where 30 of "
        "the slowest steps take longer; 0: never (default: %(default)s)",
    )
    engine.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        default="fcfs",
        help="who runs first: fcfs: by arrival alone, a request that sets 'priority' is refused; priority: the request "
        "with the lowest 'priority' number, which any client may choose (default: %(default)s)",
    )
    engine.add_argument(
        "--block-size", type=int, default=16, help="tokens a KV block holds at TP 1 (default: %(default)s)"
    )
    engine.add_argument("--num-gpu-blocks-override", dest="num_blocks", type=int, help="KV blocks a device")
    engine.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help="pallas: kernels for NVIDIA GPUs (interpreted, slowly, on CPU); xla: plain JAX; auto: pallas where there "
        "is a GPU (default: %(default)s)",
    )
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="fraction for weights and KV (default: %(default)s)"
    )
    engine.add_argument("--device-memory-bytes", type=int, help="memory of one device (default: asked from it)")
    engine.add_argument("--optimization-level", "-O", type=int, help="0 to 3; 0 starts faster and runs slower")
    engine.add_argument("--seed", type=int, default=0, help="from which unseeded requests draw their seeds")
    engine.add_argument(
        "--no-overlap", dest="overlap", action="store_false", help="harvest each step before the next (debugging)"
    )
