"""Reading result files: what kind each is, the runs in it, and where its figures come from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fly_jax.bench.metrics import LATENCIES
from fly_jax.errors import ConfigError

# In the order in which they are shown; those that a file lacks are left out.
PROVENANCE_KEYS = (
    "date", "fly_jax", "versions", "jax", "jaxlib", "python", "device_kind", "num_devices", "machine", "host",
)  # fmt: skip
SHOWN_CHARACTERS = 400
# Longer layout texts are shown in short.
LONGEST_LAYOUT = 9


class Kind(StrEnum):
    """What a file holds.

    ``SWEEP``: serving runs side by side; ``SERVE``: one of them; ``SWITCH``: switches and what each cost;
    ``ROWS``: settings and a table, as of ``kernels``, ``throughput`` and ``latency``; ``OTHER``: anything else.
    """

    SWEEP = "sweep"
    SERVE = "serve"
    SWITCH = "switch"
    ROWS = "rows"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """From ``at`` seconds after the start of the run on, the layout is this one."""

    at: float
    layout: str


@dataclass(frozen=True, slots=True)
class Run:
    """One serving run.

    Attributes:
        name: what distinguishes it in a picture: its layout, or its policy and strategy.
        rate: requests/s asked for; inf: all at once; nan: the workload's own.
        start_times: when each request was sent, in seconds from the start.
        timeline: the layouts in force, oldest first; empty for other servers.
        values: the run's part of the file, as :func:`measured`.
    """

    name: str
    rate: float
    start_times: tuple[float, ...]
    timeline: tuple[LayoutChange, ...]
    values: Mapping[str, Any]

    def number(self, key: str) -> float:
        """nan where the file has no such figure."""
        return number(self.values.get(key))

    def percentile(self, metric: str, percent: int) -> float:
        """Milliseconds of ``ttft``, ``tpot``, ``itl`` or ``e2el``; nan if the file has it not."""
        return percentile(self.values, metric, percent)

    @property
    def limits(self) -> str:
        """What goodput was counted by, such as ``TTFT 500 ms, TPOT 50 ms``; empty if the file does not say."""
        limits = self.values.get("goodput_limits_ms")
        found = limits.items() if isinstance(limits, Mapping) else ()
        return ", ".join(f"{plain(name).upper()} {number(each):g} ms" for name, each in found)

    @property
    def changes(self) -> tuple[LayoutChange, ...]:
        """The entries of the timeline that differ from the one before."""
        return tuple(after for before, after in itertools.pairwise(self.timeline) if after.layout != before.layout)


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file's name, its kind and what is in it."""

    name: str
    kind: Kind
    values: Mapping[str, Any]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Of a sweep or of one serving run; empty for the other kinds."""
        if self.kind is Kind.SWEEP:
            return runs_of(self.values)
        return (_run(self.values),) if self.kind is Kind.SERVE else ()


def read(path: Path) -> ResultFile:
    """Reads one result file.

    Raises:
        ConfigError: it is not there, not JSON, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"result file {path} cannot be read ({error.strerror}): give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"result file {path} is not JSON ({error}): give a file that a benchmark wrote") from None
    if not isinstance(values, dict):
        raise ConfigError(f"result file {path} holds no JSON object but a {type(values).__name__}: give a result file")
    return ResultFile(path.name, kind_of(values), values)


def kind_of(values: Mapping[str, Any]) -> Kind:
    """By the keys that only this kind has."""
    if records(values.get("runs")):
        return Kind.SWEEP
    if records(values.get("switches")):
        return Kind.SWITCH
    if "request_throughput" in values:
        return Kind.SERVE
    return Kind.ROWS if records(values.get("rows")) else Kind.OTHER


def records(value: object) -> list[Mapping[str, Any]]:
    """The objects of a JSON list; none if it is something else."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def runs_of(sweep: Mapping[str, Any]) -> tuple[Run, ...]:
    """The runs of a sweep's result, in its order."""
    return tuple(_run(each) for each in records(sweep.get("runs")))


def answered_nothing(values: object) -> bool:
    """Whether a run, or the part of it with one tag, says that no request was answered."""
    return isinstance(values, Mapping) and number(values.get("completed")) == 0


def measured(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the latencies of a run that answered nothing: files hold zeros, which would be the fastest."""
    if not answered_nothing(values):
        return values
    endings = tuple(f"_{metric}_ms" for metric in LATENCIES)
    return {key: each for key, each in values.items() if not key.endswith(endings)}


def _run(values: Mapping[str, Any]) -> Run:
    timeline = tuple(
        LayoutChange(number(each.get("at")), plain(each.get("layout")))
        for each in records(values.get("layout_timeline"))
        if math.isfinite(number(each.get("at")))
    )
    name, rate = _run_name(values, timeline), number(values.get("request_rate"))
    starts = tuple(sorted(_numbers(values, "start_times")))
    return Run(name, rate, starts, tuple(sorted(timeline, key=lambda each: each.at)), measured(values))


def _run_name(values: Mapping[str, Any], timeline: Sequence[LayoutChange]) -> str:
    policy, strategy = (plain(values.get(key) or "") for key in ("policy", "strategy"))
    layout = plain(values.get("layout") or (timeline[0].layout if timeline else ""))
    if policy in ("", "static"):
        return short_layout(layout) or plain(values.get("model_id") or values.get("backend") or "run")
    return f"{policy}, {strategy}" if strategy else policy


def number(value: object) -> float:
    """A JSON number, or the text of one such as ``"inf"``; nan for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _numbers(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    listed = values.get(key)
    found = (number(each) for each in listed) if isinstance(listed, list) else ()
    return tuple(each for each in found if math.isfinite(each))


def percentile(values: Mapping[str, Any], metric: str, percent: int) -> float:
    """Milliseconds; the median is a p50 too, which is all that some files have."""
    found = number(values.get(f"p{percent}_{metric}_ms"))
    return number(values.get(f"median_{metric}_ms")) if percent == 50 and math.isnan(found) else found


def plain(value: object) -> str:
    """Text for a label: one line, printable, not long."""
    text = "".join(each if each.isprintable() else "?" for each in str(value))
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def short_layout(layout: str, longest: int = LONGEST_LAYOUT) -> str:
    """Canonical text, or where that is longer with runs of equal groups counted: ``8x1``, ``4+4x1``."""
    if len(layout) <= longest:
        return layout
    groups = [(degree, len(list(group))) for degree, group in itertools.groupby(layout.split("+"))]
    return "+".join(degree if count == 1 else f"{count}x{degree}" for degree, count in groups)


def provenance_of(values: Mapping[str, Any]) -> dict[str, str]:
    """When, with what and on what the figures were measured, as far as the file says."""
    found: dict[str, str] = {}
    for key in PROVENANCE_KEYS:
        value = values.get(key)
        if isinstance(value, Mapping):
            found.update({plain(name): plain(each) for name, each in value.items()})
        elif value is not None:
            found[key.replace("_", "-") if key == "fly_jax" else key.replace("_", " ")] = plain(value)
    return found


def provenance_line(values: Mapping[str, Any]) -> str:
    """:func:`provenance_of` in one line; says so where the file states nothing."""
    found = provenance_of(values)
    bare = ("date", "machine", "host")
    stated = "; ".join(value if key in bare else f"{key} {value}" for key, value in found.items())
    return stated or "date, versions and machine not stated"
