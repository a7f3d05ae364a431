"""What the phases showed, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from fly_jax.bench import terminal
from fly_jax.bench.abuse_parts.phases import PHASES
from fly_jax.bench.abuse_parts.records import PhaseResult

# What a well-behaved client may notice of an abuse that causes no switch, beyond what it sees without any.
LIMIT_MS = 150.0
BASELINES = {phase.name: phase.baseline for phase in PHASES}
LEGEND = (
    "ms; in brackets: above the phase without abuse (* more than {limit:.0f}). The longest gap of a well-behaved "
    "stream, the longest answer and longest gap of /health, the longest answer to a short prompt; refusals of these "
    "three; how late the measuring process itself was; resident memory before, at most and after"
)


def tables(found: Sequence[PhaseResult]) -> str:
    """Two tables as text: what others saw of each phase, and what the phase itself was answered."""
    console = Console(width=terminal.WIDTH_OF_FILES, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(_seen_by_others(found))
        console.print(LEGEND.format(limit=LIMIT_MS))
        console.print(_answers(found))
    return captured.get()


def _seen_by_others(found: Sequence[PhaseResult]) -> Table:
    table = Table(title="What the others saw")
    for heading in (
        "phase", "s", "stream gap", "/health", "/health gap", "short", "refused", "lag",
        "switches", "RSS MiB", "log bytes",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    by_name = {each.name: each for each in found}
    for each in found:
        table.add_row(*_row(each, by_name.get(BASELINES[each.name])))
    return table


def _row(phase: PhaseResult, baseline: PhaseResult | None) -> list[str]:
    server, probes = phase.server, phase.probes
    refused = (sum(each.failures.values()) for each in (probes.streams, probes.health, probes.short))
    before: Sequence[float | None] = [None] * 4 if baseline is None or baseline is phase else _longest(baseline)
    return [
        phase.name,
        f"{phase.seconds:.0f}",
        *(_compared(now, was) for now, was in zip(_longest(phase), before, strict=True)),
        " ".join(map(str, refused)),
        f"{probes.lag_ms:.0f}",
        _shown(server.switches),
        f"{_shown(server.rss_before_mib)} {_shown(server.rss_peak_mib)} {_shown(server.rss_after_mib)}",
        _shown(server.log_bytes),
    ]


def _longest(phase: PhaseResult) -> list[float]:
    probes = phase.probes
    return [
        probes.streams.longest_gap_ms,
        probes.health.longest_ms,
        probes.health.longest_gap_ms,
        probes.short.longest_ms,
    ]


def _compared(now: float, was: float | None) -> str:
    if was is None:
        return _shown(now)
    return f"{now:.0f} ({now - was:+.0f}{'*' if now - was > LIMIT_MS else ''})"


def _answers(found: Sequence[PhaseResult]) -> Table:
    table = Table(title="What the abuser was answered, and what the phase tells")
    for heading in ("phase", "answers", "figures", "median gap", "short median"):
        table.add_column(heading)
    for each in found:
        streams, short = each.probes.streams, each.probes.short
        table.add_row(
            each.name, _pairs(each.answers), _pairs(each.figures), _shown(streams.median_gap_ms, 1),
            _shown(short.median_ms, 1),
        )  # fmt: skip
    return table


def _pairs(values: Mapping[str, int] | Mapping[str, int | float | None]) -> str:
    return ", ".join(f"{name} {'-' if value is None else value}" for name, value in values.items())


def _shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
