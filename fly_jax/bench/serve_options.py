"""Options of ``python -m fly_jax.bench serve``, with the names of ``vllm bench serve`` where the thing is the same."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

from fly_jax.bench import results
from fly_jax.bench.arrivals import RAMP_UP_STRATEGIES
from fly_jax.bench.load_format import add_load_format
from fly_jax.bench.workload_files import KINDS, RANDOM, known_workloads
from fly_jax.errors import ConfigError

DESCRIPTION = (
    "Sends requests to an OpenAI-compatible server on a schedule and prints how long they took: the time to the first "
    "token (TTFT), the time for each further token (TPOT), gaps between tokens (ITL), the whole request (E2EL). "
    "Metrics and result keys are those of 'vllm bench serve', and options that do the same have the same names. "
    "Try: python -m fly_jax.bench serve "
    "--self-hosted checkpoints/demo/model --num-prompts 50 --request-rate 5"
)
BACKENDS = ("openai", "vllm", "openai-chat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.set_defaults(command=_run)
    _add_table(add_load_arguments(parser))


def _run(options: argparse.Namespace) -> int:
    return int(command_module("serve").run(options))


def command_module(name: str) -> ModuleType:
    """A command that needs the extra ``bench``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"fly_jax.bench.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: python -m pip install 'fly-jax[bench]'") from error


def add_load_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What every command that puts load on a server takes; returns the group about results."""
    _add_server(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("what is sent"))
    _add_schedule(parser.add_argument_group("when it is sent"))
    group = parser.add_argument_group("results")
    _add_results(group)
    results.add_arguments(group)
    return group


def _add_table(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        help="latencies in the table, of ttft,tpot,itl,e2el; the file has all (default: %(default)s)",
    )
    group.add_argument("--save-detailed", action="store_true", help="write the generated texts as well")


def _add_server(group: argparse._ArgumentGroup) -> None:
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--base-url", help="a running server, without a path (default: http://HOST:PORT of the next two)"
    )
    where.add_argument(
        "--self-hosted", type=Path, metavar="MODEL_DIR", help="start 'fly-jax serve MODEL_DIR' for the run instead"
    )
    add_load_format(group)
    group.add_argument("--host", default="127.0.0.1", help="of a running server (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="of a running server (default: %(default)s)")
    group.add_argument(
        "--server-args",
        default="",
        metavar="ARGS",
        help="its further arguments, as one: --server-args='--devices 4 --layout 2+2'",
    )
    group.add_argument(
        "--model", "--served-model-name", help="name in the requests (default: the first that the server lists)"
    )
    group.add_argument(
        "--backend", choices=BACKENDS, default="openai", help="openai-chat sends chats (default: %(default)s)"
    )
    group.add_argument("--endpoint", help="path (default: /v1/completions, or /v1/chat/completions for openai-chat)")
    group.add_argument(
        "--api-key", help="key that the server asks for (default: $FLY_JAX_API_KEY, or else $OPENAI_API_KEY)"
    )
    group.add_argument("--header", nargs="+", default=[], metavar="KEY=VALUE", help="of every request")
    group.add_argument(
        "--extra-body", default="{}", metavar="JSON", help="fields of every request, such as '{\"top_p\": 0.9}'"
    )
    group.add_argument(
        "--max-model-len", type=int, help="tokens that the model holds (default: what the server says, or no limit)"
    )


def _add_workload(group: argparse._ArgumentGroup) -> None:
    known = known_workloads()
    group.add_argument(
        "--workload",
        metavar="NAME_OR_PATH",
        help=f"a workload, which has its own times: a TOML file, or one of bench/workloads ({', '.join(known)})",
    )
    group.add_argument(
        "--dataset-name",
        help="prompts and lengths, sent at --request-rate: random (with the options below), or, with --dataset-path, "
        f"any of {', '.join(kind for kind in KINDS if kind != RANDOM)} (default: random)",
    )
    group.add_argument("--dataset-path", type=Path, help="file of the dataset, or of the trace that a workload replays")
    group.add_argument("--num-prompts", type=int, help="requests (default: 1000; of a workload: as many as it says)")
    group.add_argument(
        "--random-input-len", type=int, help="prompt tokens (default: 1024, or fewer if the model holds fewer)"
    )
    group.add_argument(
        "--random-output-len", type=int, help="output tokens (default: 128, or fewer if the model holds fewer)"
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="lengths are uniform within (1 - ratio) to (1 + ratio) times these (default: %(default)s)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        help="random token ids are below it (default: from the folder of --self-hosted, else 1000)",
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="generate the whole output length, past end tokens too (default: yes, except for sharegpt's real text)",
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and times (default: %(default)s)")


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate", type=float, help="requests a second; inf: all at once (default: inf, or the workload's times)"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma distribution of gaps: 1 is a Poisson process, less is burstier (default: %(default)s)",
    )
    group.add_argument("--max-concurrency", type=int, help="requests in flight at most (default: no bound)")
    group.add_argument(
        "--num-warmups",
        type=int,
        default=0,
        help="the first so many requests are sent before the run as well, and not counted (default: %(default)s)",
    )
    group.add_argument(
        "--ramp-up-strategy", choices=RAMP_UP_STRATEGIES, help="let the rate go from one to another over the run"
    )
    group.add_argument("--ramp-up-start-rps", type=float, help="requests a second at the first request")
    group.add_argument("--ramp-up-end-rps", type=float, help="requests a second at the last request")


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests a second that keep all limits, such as ttft:200 tpot:50 (also e2el)",
    )
    group.add_argument("--metric-percentiles", default="99", help="such as 50,99.9 (default: %(default)s)")
    group.add_argument(
        "--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="write these into the file, such as gpu=h200"
    )
    group.add_argument("--label", help="at the beginning of the file's name")
    group.add_argument("--result-filename", help="(default: from what was run)")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress")
