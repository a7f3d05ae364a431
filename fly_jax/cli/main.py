"""The ``fly-jax`` command: serve, generate, convert, demo."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from fly_jax import __version__
from fly_jax.cli.options import (
    add_convert_options,
    add_demo_options,
    add_engine_options,
    add_generate_options,
    add_serve_options,
)
from fly_jax.cli.vllm_options import add_vllm_options, warn_of_ignored
from fly_jax.config import EngineConfig
from fly_jax.errors import ConfigError, EngineDeadError, FlyJaxError
from fly_jax.host.log_limit import LogLimit
from fly_jax.platform import DEFAULT_DEVICES, configure_devices, secret

Command = Callable[[argparse.Namespace], int]

FAILURE, USAGE_ERROR = 1, 2
OWN_LOGGERS = ("fly_jax", "serving", "checkpoints")


class Parser(argparse.ArgumentParser):
    """One clear line for a wrong option."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2 for what the user can mend, 1 if the engine or a prompt failed."""
    options = _parser().parse_args(arguments)
    _configure_logging(options.log_level or ("info" if options.command is serve else "warning"))
    command: Command = options.command
    try:
        return command(options)
    except FlyJaxError as error:
        print(f"fly-jax: error: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, EngineDeadError) else USAGE_ERROR
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
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogLimit())


def serve(options: argparse.Namespace) -> int:
    """Binds the port, loads the model, serves until a signal."""
    from serving import ConnectionLimits, ServerOptions, run

    warn_of_ignored(options)
    server = ServerOptions(
        host=options.host,
        port=options.port,
        api_keys=_api_keys(options.api_key),
        admin_key=_key(options.admin_key, "--admin-key", "FLY_JAX_ADMIN_KEY"),
        served_model_names=tuple(options.served_model_name or ()),
        allowed_origins=options.allowed_origins,
        shutdown_timeout=options.shutdown_timeout,
        connections=ConnectionLimits(
            connections=options.limit_concurrency,
            keep_alive=options.timeout_keep_alive,
            headers=options.timeout_headers,
            body=options.timeout_body,
            reading=options.timeout_reading,
        ),
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

    given = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.request_seed}
    if options.top_p is not None:
        given["top_p"] = options.top_p
    SamplingParams(**given)  # a wrong one is refused before anything is loaded
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin]
    with LLM(**_engine_options(options), progress=not options.quiet) as llm:
        outputs = llm.generate(prompts, replace(llm.get_default_sampling_params(), **given))
    for output in outputs:
        print(f"{output.prompt}{output.text}")
        if output.error is not None:
            print(f"fly-jax: error: {output.error}", file=sys.stderr)
    return FAILURE if any(output.error is not None for output in outputs) else 0


def convert(options: argparse.Namespace) -> int:
    """Writes a prepared Orbax checkpoint."""
    import jax.numpy as jnp

    from checkpoints import convert as convert_folder
    from fly_jax.progress import LoadProgress

    with LoadProgress(enabled=not options.quiet) as bar:
        convert_folder(
            options.hf_folder,
            options.out_folder,
            max_tp=options.max_tp,
            dtype=None if options.dtype == "auto" else jnp.dtype(options.dtype),
            progress=lambda done, total: bar.report("loading", done, total),
        )
    print(f"{options.out_folder} is ready: fly-jax serve {options.out_folder}")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Sends a burst at a server while its layout changes."""
    from serving.demo import run_demo

    admin_key = _key(options.admin_key, "--admin-key", "FLY_JAX_ADMIN_KEY")
    return run_demo(options.url, options.requests, admin_key, options.switch_strategy)


def _api_keys(given: Sequence[str] | None) -> tuple[str, ...]:
    keys = [_key(key, "--api-key", "FLY_JAX_API_KEY") for key in given or (None,)]
    return tuple(key for key in keys if key is not None)


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
    for command, groups, help_text in (
        (
            serve,
            (add_engine_options, add_serve_options, add_vllm_options),
            "serve a model with an OpenAI-compatible API",
        ),
        (generate, (add_engine_options, add_generate_options), "complete prompts and exit"),
        (convert, (add_convert_options,), "prepare a Hugging Face folder once, as an Orbax checkpoint"),
        (demo, (add_demo_options,), "send a burst at a server while its layout changes"),
    ):
        subparser = commands.add_parser(command.__name__, help=help_text)
        subparser.set_defaults(command=command)
        for add_options in groups:
            add_options(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
