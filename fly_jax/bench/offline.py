"""What ``throughput`` and ``latency`` share: an engine in this process, random prompts, and one row a layout."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from fly_jax.bench import results, terminal
from fly_jax.bench.load_format import add_load_format
from fly_jax.bench.output_paths import check_file
from fly_jax.bench.plan_limits import FIRST_RANDOM_ID
from fly_jax.bench.prompts import Prompt, RandomPrompts
from fly_jax.config import ATTENTION_BACKENDS, DTYPES, MIN_PROMPT_TOKENS, EngineConfig
from fly_jax.errors import ConfigError, FlyJaxError
from fly_jax.layout import Layout
from fly_jax.outputs import FinishReason, RequestOutput, SwitchReport
from fly_jax.platform import DEFAULT_DEVICES, configure_devices
from fly_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from fly_jax.models.config import ModelConfig

Prompts = list[Prompt]
LEAST_BATCHED_TOKENS = 512


class OfflineEngine(Protocol):
    """What is used of :class:`fly_jax.LLM`."""

    def generate(self, prompts: Prompts, params: SamplingParams) -> list[RequestOutput]: ...

    def switch(self, layout: str) -> SwitchReport: ...

    @property
    def layout(self) -> str: ...

    @property
    def model_config(self) -> ModelConfig: ...


@dataclass(frozen=True, slots=True)
class InLayout:
    """The engine has just come to a layout.

    Attributes:
        layout: canonical text.
        switch_ms: from asking for it until it was there, with no request in flight; None where the engine began.
    """

    layout: str
    switch_ms: float | None


def add_engine_arguments(parser: argparse.ArgumentParser, *, input_len: int, output_len: int) -> None:
    """The options of both commands, under vLLM's names."""
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled demo model)")
    parser.add_argument(
        "--devices", type=int, default=DEFAULT_DEVICES,
        help="devices of the engine; on CPU that many virtual ones (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", nargs="+", metavar="LAYOUT",
        help="layouts to measure in, one after another in one engine: 1+1+1+1 2+2 4 are four groups of one device, two "
        "of two and one of four (default: the narrowest groups that hold the model)",
    )  # fmt: skip
    parser.add_argument("--input-len", type=int, default=input_len, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument(
        "--output-len", type=int, default=output_len, help="tokens of each answer (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto keeps the checkpoint's (default: auto)")
    add_load_format(parser)
    parser.add_argument(
        "--attention-backend", choices=ATTENTION_BACKENDS, default="auto",
        help="pallas: our GPU kernels; xla: plain JAX (default: auto, which is pallas on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts and of sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="write the figures to this file, which 'report' can show"
    )


def check(options: argparse.Namespace, at_least_one: Sequence[str], at_least_zero: Sequence[str] = ()) -> None:
    """Everything that can be said about the options before a model is read; layouts become canonical.

    Args:
        at_least_one, at_least_zero: the command's own options with that limit.

    Raises:
        ConfigError, LayoutError: an option is wrong; one line that says what to do.
    """
    for name in ("devices", "input_len", "output_len", *at_least_one):
        _require(options, name, 1)
    for name in ("seed", *at_least_zero):
        _require(options, name, 0)
    layouts = [str(Layout.parse(text, options.devices)) for text in options.layout or ()]
    if len(set(layouts)) < len(layouts):
        raise ConfigError(f"--layout {' '.join(layouts)} names a layout twice: name each once")
    options.layout = layouts
    if options.output_json is not None:
        check_file("--output-json", options.output_json)


def _require(options: argparse.Namespace, name: str, least: int) -> None:
    if getattr(options, name) < least:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} must be at least {least}, got {getattr(options, name)}")


def was_interrupted(options: argparse.Namespace, max_num_seqs: int, measure: Callable[[OfflineEngine], None]) -> bool:
    """Loads the engine and measures; Ctrl-C ends that and leaves what ``measure`` has put away so far.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError: as :func:`loaded_engine`.
        FlyJaxError: a request did not complete.
    """
    try:
        with loaded_engine(options, max_num_seqs) as llm:
            measure(llm)
    except KeyboardInterrupt:
        return True
    return False


def finish(
    options: argparse.Namespace,
    settings: Sequence[str],
    rows: Sequence[DataclassInstance],
    interrupted: bool,
) -> int:
    """Writes the figures, if that is asked for and there are any, and says what an interrupted run lacks.

    Args:
        settings: names of the options that belong to the figures.

    Returns:
        0; 130 if the run was interrupted.
    """
    if options.output_json is not None and rows:
        said = {name: getattr(options, name) for name in settings} | {"interrupted": interrupted}
        results.write(options.output_json, result(options, said, [asdict(row) for row in rows]))
        print(f"written to {options.output_json}")
    if interrupted:
        layouts = max(1, len(options.layout))
        terminal.say(f"interrupted: there are figures of {len(rows)} of {layouts} layouts")
    return terminal.INTERRUPTED_CODE if interrupted else 0


@contextmanager
def loaded_engine(options: argparse.Namespace, max_num_seqs: int) -> Iterator[OfflineEngine]:
    """Loads the model with programs for the layouts that are asked for and no others.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError: one line that says what to do.
    """
    configure_devices(options.devices)
    from checkpoints.demo import MODEL  # jax comes with it: only once the devices are configured
    from fly_jax.engine.plan import plan_engine
    from fly_jax.llm import LLM

    given: dict[str, Any] = {
        "model": options.model or MODEL,
        "devices": options.devices,
        "layout": options.layout[0] if options.layout else None,
        "policy": "static",
        "dtype": options.dtype,
        "load_format": options.load_format,
        "attention_backend": options.attention_backend,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(LEAST_BATCHED_TOKENS, max_num_seqs + MIN_PROMPT_TOKENS),
        "seed": options.seed,
    }
    plan = plan_engine(EngineConfig(**given))
    check_lengths(options, plan.max_model_len, plan.model_config.vocab_size)
    layouts = tuple(options.layout) or (str(plan.layout),)
    with Console(stderr=True).status("loading the model and compiling its programs"):
        llm = LLM(**given, layouts=layouts, progress=False)
    with llm:
        yield llm


def check_lengths(options: argparse.Namespace, max_model_len: int, vocab_size: int) -> None:
    """
    Raises:
        ConfigError: a request is longer than the model's context, or there are no ids to draw from.
    """
    if options.input_len + options.output_len > max_model_len:
        raise ConfigError(
            f"--input-len {options.input_len} + --output-len {options.output_len} exceed the model's context of "
            f"{max_model_len} tokens: lower one"
        )
    if vocab_size <= FIRST_RANDOM_ID:
        raise ConfigError(
            f"prompts are drawn from token ids {FIRST_RANDOM_ID} and up, but the model's vocabulary has {vocab_size}: "
            "give another --model"
        )


def each_layout(llm: OfflineEngine, options: argparse.Namespace) -> Iterator[InLayout]:
    """Takes the engine through the layouts, the first of which it is in already."""
    yield InLayout(llm.layout, None)
    for layout in options.layout[1:]:
        started = time.perf_counter()
        llm.switch(layout)
        yield InLayout(layout, 1e3 * (time.perf_counter() - started))


class PromptSource:
    """Random prompts of one length; the same in every run with the same seed, and none twice in a run, so that no
    cache of prefixes can help."""

    def __init__(self, seed: int, vocab_size: int, input_len: int) -> None:
        self._prompts, self._input_len = RandomPrompts(seed, vocab_size), input_len
        self._numbers = itertools.count()

    def take(self, count: int) -> Prompts:
        return [self._prompts.prompt(number, self._input_len) for number in itertools.islice(self._numbers, count)]


def timed_generate(llm: OfflineEngine, prompts: Prompts, output_len: int) -> tuple[float, list[RequestOutput]]:
    """Seconds from handing over all prompts to the last token of the last, and what came.

    Raises:
        FlyJaxError: a request did not yield all its tokens; figures without it would mean nothing.
    """
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - started
    short = [each for each in outputs if each.finish_reason is not FinishReason.LENGTH]
    if short:
        why = short[0].error or f"{len(short[0].token_ids)} of {output_len} tokens, {short[0].finish_reason}"
        raise FlyJaxError(f"{len(short)} of {len(outputs)} requests did not complete, the first: {why}")
    return elapsed, outputs


def result(options: argparse.Namespace, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings and a row a layout; where only one was measured its keys are at the top too, where vLLM has them."""
    only = rows[0] if len(rows) == 1 else {}
    return {"model": options.model.name if options.model else "demo", **settings, **only, "rows": rows}
