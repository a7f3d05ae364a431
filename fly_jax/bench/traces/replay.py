"""Replays a window of a trace: its arrivals and its lengths, with prompts of random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.prompts import Prompt, RandomPrompts
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.traces.rows import TraceRow
from fly_jax.bench.workload_fields import Fields
from fly_jax.bench.workload_plan import Drafted, Lengths, WorkloadPlan, fit, gather
from fly_jax.errors import ConfigError

ReadRows = Callable[[Path], Iterator[TraceRow]]


@dataclass(frozen=True)
class Replay:
    """How a trace is replayed.

    Attributes:
        rate_scale: how much faster than real time.
        window_start, window_seconds: what is replayed, in seconds of the trace's time from its first request.
        input_scale, output_scale: lengths are multiplied by these.
    """

    rate_scale: float
    window_start: float
    window_seconds: float
    input_scale: float
    output_scale: float

    def lengths(self, row: TraceRow, max_model_len: int) -> Lengths:
        """What a row's request asks for."""
        prompt, output = round(row.input_tokens * self.input_scale), round(row.output_tokens * self.output_scale)
        return fit(prompt, output, max_model_len)


def read_replay(fields: Fields) -> Replay:
    """The keys of a trace workload; everything from the beginning, as it was, where they are absent.

    Raises:
        ConfigError: a field is wrong.
    """
    windowed = fields.has("window_seconds")
    return Replay(
        rate_scale=fields.number("rate_scale", above=0, default=1.0),
        window_start=fields.number("window_start", minimum=0, default=0.0),
        window_seconds=fields.number("window_seconds", above=0) if windowed else math.inf,
        input_scale=fields.number("input_scale", above=0, default=1.0),
        output_scale=fields.number("output_scale", above=0, default=1.0),
    )


def plan_trace(fields: Fields, dataset: Path, read_rows: ReadRows, limits: PlanLimits, seed: int) -> WorkloadPlan:
    """The requests of a window of a trace.

    A request's prompt depends on the seed and on its line in the file, or on its hash ids; not on the window.

    Raises:
        ConfigError: a field is wrong, the file is not of the format or not in the order of time, or there is no
            request in the window.
    """
    replay = read_replay(fields)
    fields.finish()
    prompts = RandomPrompts(seed, limits.vocab_size, as_text=limits.as_text)
    drafted: list[Drafted] = []
    skipped = 0
    for offset, row in _window(read_rows(dataset), dataset, replay):
        if len(drafted) == limits.num_prompts:
            break
        if not row.input_tokens or not row.output_tokens:
            skipped += 1
            continue
        lengths = replay.lengths(row, limits.max_model_len)
        request = PlannedRequest(
            at=offset / replay.rate_scale,
            prompt=_prompt(prompts, row, lengths.prompt, replay.input_scale),
            prompt_tokens=lengths.prompt,
            max_tokens=lengths.output,
            tag=row.tag,
        )
        drafted.append(Drafted(request, lengths.clipped))
    if not drafted:
        raise ConfigError(
            f"{dataset} has no request with a prompt and an output in the {replay.window_seconds:g} s from second "
            f"{replay.window_start:g} on; change window_start or window_seconds in {fields.file}"
        )
    return gather(drafted, skipped, limits.max_model_len)


def _prompt(prompts: RandomPrompts, row: TraceRow, tokens: int, scale: float) -> Prompt:
    return prompts.of_blocks(row.hash_ids, tokens, scale) if row.hash_ids else prompts.prompt(row.line, tokens)


def _window(rows: Iterator[TraceRow], path: Path, replay: Replay) -> Iterator[tuple[float, TraceRow]]:
    """The rows of the window, each with its seconds from the window's start. Stops reading where it ends."""
    origin, before = None, -math.inf
    for row in rows:
        if row.at < before:
            raise ConfigError(
                f"{path}, line {row.line}: a request at {row.at:.3f} s comes after one at {before:.3f} s; "
                "sort the file by time"
            )
        origin, before = row.at if origin is None else origin, row.at
        offset = row.at - origin - replay.window_start
        if offset >= replay.window_seconds:
            return
        if offset >= 0:
            yield offset, row
