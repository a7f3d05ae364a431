"""The ``fly-jax`` command: serve, generate, convert, demo."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from fly_jax import __version__
from fly_jax.config import ATTENTION_BACKENDS, DTYPES, LOAD_FORMATS, POLICIES, SCHEDULING_POLICIES, EngineConfig
from fly_jax.errors import ConfigError, FlyJaxError
from fly_jax.outputs import SwitchStrategy
from fly_jax.platform import DEFAULT_DEVICES, configure_devices, secret

Command = Callable[[argparse.Namespace], int]

USAGE_ERROR = 2
LOAD_FORMAT_HELP = "dummy: random weights from config.json alone, to measure speed without a download (default: auto)"
OWN_LOGGERS = ("fly_jax", "serving", "checkpoints")
STRATEGIES = tuple(strategy.value for strategy in SwitchStrategy)


class Parser(argparse.ArgumentParser):
    """One clear line for a wrong option."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 for anything that the user can mend."""
    options = _parser().parse_args(arguments)
    _configure_logging(options.log_level or ("info" if options.command is serve else "warning"))
    command: Command = options.command
    try:
        return command(options)
    except FlyJaxError as error:
        print(f"fly-jax: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _configure_logging(level: str) -> None:
    """Our own messages from this level on; those of libraries only when they warn, or with ``debug``."""
    own = level.upper()
    logging.basicConfig(
        level=own if own == "DEBUG" else "WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(own)


def serve(options: argparse.Namespace) -> int:
    """Binds the port, loads the model, serves until a signal."""
    from serving import ServerOptions, run

    server = ServerOptions(
        host=options.host,
        port=options.port,
        api_key=_key(options.api_key, "--api-key", "FLY_JAX_API_KEY"),
        admin_key=_key(options.admin_key, "--admin-key", "FLY_JAX_ADMIN_KEY"),
        served_model_name=options.served_model_name,
        shutdown_timeout=options.shutdown_timeout,
    )
    config = _engine_config(options)
    configure_devices(config.devices or DEFAULT_DEVICES)

    def make_engine() -> Any:
        from fly_jax.async_engine import AsyncEngine
        from fly_jax.progress import LoadProgress

        with LoadProgress(enabled=True) as bar:
            return AsyncEngine.from_config(config, bar.report)

    run(make_engine, server)
    return 0


def generate(options: argparse.Namespace) -> int:
    """Completes prompts from the command line, or one a line from standard input."""
    from fly_jax.llm import LLM
    from fly_jax.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.request_seed
    )
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin]
    with LLM(**_engine_options(options), progress=not options.quiet) as llm:
        for output in llm.generate(prompts, params):
            print(f"{output.prompt}{output.text}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Writes a prepared Orbax checkpoint."""
    import jax.numpy as jnp

    from checkpoints import convert as convert_folder
    from fly_jax.models.config import ModelConfig, serving_dtype
    from fly_jax.progress import LoadProgress

    dtype = serving_dtype(options.dtype, ModelConfig.from_folder(options.hf_folder).dtype)
    with LoadProgress(enabled=not options.quiet) as bar:
        convert_folder(
            options.hf_folder,
            options.out_folder,
            max_tp=options.max_tp,
            dtype=jnp.dtype(dtype),
            progress=lambda done, total: bar.report("loading", done, total),
        )
    print(f"{options.out_folder} is ready: fly-jax serve {options.out_folder}")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Sends a burst at a server while its layout changes."""
    from serving.demo import run_demo

    admin_key = _key(options.admin_key, "--admin-key", "FLY_JAX_ADMIN_KEY")
    return run_demo(options.url, options.requests, admin_key, options.switch_strategy)


def _key(given: str | None, option: str, variable: str) -> str | None:
    """The option's value, or where it is left out the environment's; an empty key would mean no protection at all."""
    key, source = (given, option) if given is not None else (secret(variable), f"${variable}")
    if key == "":
        raise ConfigError(f"{source} is empty: give a key or leave it out")
    return key


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(**_engine_options(options))


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in fields(EngineConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    given["layout"] = _first_layout(options)
    return given


def _first_layout(options: argparse.Namespace) -> str | None:
    """From ``--layout``, or from the sizes of a uniform one."""
    layout, tp, dp = options.layout, options.tensor_parallel_size, options.data_parallel_size
    for option, size in (("--tensor-parallel-size", tp), ("--data-parallel-size", dp)):
        if size is not None and size < 1:
            raise ConfigError(f"{option} must be at least 1, got {size}")
        if size is not None and layout is not None:
            raise ConfigError(f"--layout {layout} and {option} {size} both name the first layout: give one of them")
    if dp is not None:
        return f"dp{dp}xtp{tp or 1}"
    return layout if tp is None else f"tp{tp}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fly-jax", description="An LLM server that changes its DP/TP layout while it serves.")
    parser.add_argument("--version", action="version", version=f"fly-jax {__version__}")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="messages from this level on (serve: info, which has every layout decision; others: warning)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a model with an OpenAI-compatible API"))
    _add_generate(commands.add_parser("generate", help="complete prompts and exit"))
    _add_convert(commands.add_parser("convert", help="prepare a Hugging Face folder once, as an Orbax checkpoint"))
    _add_demo(commands.add_parser("demo", help="send a burst at a server while its layout changes"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    server.add_argument("--api-key", help="key that /v1 asks for (default: $FLY_JAX_API_KEY)")
    server.add_argument("--admin-key", help="key that changing the layout asks for (default: $FLY_JAX_ADMIN_KEY)")
    server.add_argument("--served-model-name", help="name of the model in the API (default: the folder's)")
    server.add_argument(
        "--shutdown-timeout", type=int, default=10, help="seconds that open requests get to end (default: %(default)s)"
    )
    parser.set_defaults(command=serve)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", action="append", help="may be repeated; without it: one a line from stdin")
    sampling.add_argument("--max-tokens", type=int, default=128)
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--request-seed", type=int, help="the same seed gives the same tokens")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=generate)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_folder", type=Path, metavar="HF_DIR")
    parser.add_argument("out_folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--max-tp", type=int, default=8, help="widest TP degree to serve it at (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=convert)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="a running server (default: start one with the bundled model)")
    parser.add_argument("--requests", type=int, default=24, help="requests in flight at each layout")
    parser.add_argument("--admin-key", help="the server's admin key, if it has one")
    parser.add_argument("--switch-strategy", choices=STRATEGIES, help="how its switches treat requests in flight")
    parser.set_defaults(command=demo)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
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
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        default="priority",
        help="who runs first: priority: the request with the lowest 'priority' number, by arrival among equals; "
        "fcfs: by arrival alone (default: %(default)s)",
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


if __name__ == "__main__":
    sys.exit(main())
