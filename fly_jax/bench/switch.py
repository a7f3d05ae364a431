"""``switch``: every strategy side by side, with streams in flight."""

from __future__ import annotations

import argparse
import itertools
import queue
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fly_jax.bench import results, terminal
from fly_jax.bench.load_format import add_load_format
from fly_jax.bench.output_paths import check_file
from fly_jax.bench.result_files import short_layout
from fly_jax.cli.options import STRATEGIES
from fly_jax.config import EngineConfig
from fly_jax.errors import ConfigError, EngineDeadError, LayoutError
from fly_jax.layout import Layout
from fly_jax.outputs import RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.platform import configure_devices
from fly_jax.progress import LoadProgress
from fly_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fly_jax.engine.thread import EngineThread

COLUMNS = (
    "The table's columns, in milliseconds. drain: waiting for requests to end. ahead: copying KV while tokens still "
    "come. cutover: no request runs. worst gap: the longest that a request in flight waited for a token. limit: what "
    "the worst gap should stay under, three usual gaps and the time of the relayout programs. newcomer: time to first "
    "token of a request that arrives with the switch. total: from asking for the layout until all go on. Also: KV MB "
    "that were moved, and tokens that were computed again."
)

# Tokens that every stream has when the layout changes, and at least as many follow; each stream has some more than the
# one before it, so that they do not all end together and a drain leaves groups idle.
TOKENS_BEFORE = 24
TOKENS_AFTER = 24
MORE_TOKENS_EACH = 2
# What a stream may stand still: so many times the usual gap, and the time that relayouts take.
ACCEPTED_GAPS = 3.0
PROMPT_TOKENS = (16, 96)
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Case:
    source: str
    target: str
    strategy: SwitchStrategy


@dataclass(frozen=True, slots=True)
class Outcome:
    """One switch under load. Times in milliseconds.

    Attributes:
        total_ms: from the wish to all running streams going on.
        gap_before_ms, gap_after_ms: median gap between the tokens of a stream in either layout.
        worst_gap_ms: the longest that any stream waited for a token across the switch.
        gap_limit_ms: three times the larger median gap, and what the relayout programs took at warm-up, one by one.
        newcomer_ttft_ms, tokens_recomputed: of a second switch of the same kind, with which a request a device
            arrives. The first has none, since streams beside them also wait for their prompts.
    """

    drain_ms: float
    precopy_ms: float
    cutover_ms: float
    total_ms: float
    worst_gap_ms: float
    gap_before_ms: float
    gap_after_ms: float
    gap_limit_ms: float
    newcomer_ttft_ms: float
    kv_bytes_moved: int
    kv_bytes_precopied: int
    tokens_recomputed: int
    requests_moved: int
    requests_paused: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keeps requests in flight, changes the layout under them with each strategy, and prints what that cost them: "
        "between every two uniform layouts and two mixed ones, or between those given by --switch. Try: python -m "
        "fly_jax.bench switch --devices 4 --streams 4 --repeat 1 --switch dp4,tp4"
    )
    parser.epilog = COLUMNS
    parser.set_defaults(command=run)
    parser.add_argument("model", nargs="?", type=Path, help="model folder (default: the bundled demo model)")
    parser.add_argument(
        "--devices",
        type=int,
        default=8,
        help="devices of the engine; on CPU that many virtual ones (default: %(default)s)",
    )
    add_load_format(parser)
    parser.add_argument(
        "--streams", type=int, default=16, help="requests in flight at each switch (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="how often each switch is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--switch",
        action="append",
        metavar="FROM,TO",
        help="only from this layout to that one, such as dp8,4+2+2; may be given several times",
    )
    parser.add_argument(
        "--strategy", action="append", choices=STRATEGIES, help="only with this strategy; may be given several times"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts and of their lengths (default: %(default)s)"
    )
    results.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        ConfigError, LayoutError: an option is wrong; one line that says what to do.
    """
    if options.devices & (options.devices - 1):
        raise ConfigError(f"--devices must be a power of two, got {options.devices}")
    if min(options.streams, options.repeat, options.devices) < 1:
        raise ConfigError("--streams, --repeat and --devices must be at least 1")
    cases = _cases(options)
    if options.save_result:
        check_file("--result-dir", options.result_dir / "switch.json")
    configure_devices(options.devices)
    console = terminal.console()
    measured: dict[Case, list[Outcome]] = defaultdict(list)
    with _Bench(options, _layouts(cases)) as bench:
        rounds = [case for _ in range(options.repeat) for case in cases]
        for case in track(rounds, "switching", console=Console(stderr=True)):
            measured[case].append(bench.measure(case))
        relayout_ms, moved = bench.relayout_ms, bench.weight_bytes_moved
    _print(console, measured, relayout_ms, options)
    console.print(f"weights: {moved} bytes moved, by the addresses of every group's views before and after")
    if options.save_result:
        result = {"model": str(options.model or "demo"), "streams": options.streams, "repeat": options.repeat}
        found = {"relayout_ms": relayout_ms, "weight_bytes_moved": moved}
        rows = [{**asdict(case), "runs": [asdict(each) for each in runs]} for case, runs in measured.items()]
        path = results.save(options.result_dir, "switch", {**result, **found, "switches": rows})
        console.print(f"written to {path}")
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    strategies = [SwitchStrategy(name) for name in options.strategy or SwitchStrategy]
    if options.switch:
        pairs = [_pair(text, options.devices) for text in options.switch]
    else:
        pairs = default_pairs(options.devices)
    if not pairs:
        raise ConfigError("one device has one layout: give --devices 2 or more")
    return [Case(source, target, strategy) for source, target in pairs for strategy in strategies]


def _pair(text: str, devices: int) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2:
        raise LayoutError(f"--switch {text} is not understood: write FROM,TO such as dp{devices},tp{devices}")
    return str(Layout.parse(parts[0], devices)), str(Layout.parse(parts[1], devices))


def default_pairs(devices: int) -> list[tuple[str, str]]:
    """Every two uniform layouts, and half the devices as one group against the rest on their own."""
    degrees = [1 << power for power in range(devices.bit_length()) if devices % (1 << power) == 0]
    uniform = [str(Layout.parse(f"tp{degree}", devices)) for degree in degrees]
    pairs = list(itertools.permutations(uniform, 2))
    if devices >= 4:
        mixed = str(Layout((devices // 2, *[1] * (devices // 2))))
        pairs += [(uniform[0], mixed), (mixed, uniform[-1])]
    return pairs


def _layouts(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for case in cases for text in (case.source, case.target)))


class _Stream:
    """One request's deltas, with the time of each token."""

    def __init__(self, arrivals: queue.SimpleQueue[_Stream | EngineDeadError]) -> None:
        self.times: list[float] = []
        self.finished = False
        self._arrivals = arrivals

    def __call__(self, delta: RequestDelta | EngineDeadError) -> None:
        if isinstance(delta, EngineDeadError):
            self._arrivals.put(delta)
            return
        self.times += [time.perf_counter()] * len(delta.token_ids)
        self.finished = delta.finish_reason is not None
        self._arrivals.put(self)

    def gaps(self, start: float, end: float) -> list[float]:
        inside = [at for at in self.times if start <= at <= end]
        return [1e3 * (after - before) for before, after in itertools.pairwise(inside)]


@dataclass(frozen=True, slots=True)
class _Switched:
    """What was seen of one switch: when it was asked for and done, its report and the requests."""

    asked: float
    done: float
    report: SwitchReport
    streams: Sequence[_Stream]
    newcomers: Sequence[_Stream]

    @property
    def gaps(self) -> tuple[list[float], list[float]]:
        """Milliseconds between the tokens of the streams, before and after."""
        before = [gap for each in self.streams for gap in each.gaps(self.streams[0].times[0], self.asked)]
        return before, [gap for each in self.streams for gap in each.gaps(self.done, float("inf"))]


class _Bench:
    """An engine, and loads for it."""

    def __init__(self, options: argparse.Namespace, layouts: Sequence[str]) -> None:
        from checkpoints.demo import MODEL  # jax comes with it: only once the devices are configured

        self._streams, self._devices, self._random = options.streams, options.devices, random.Random(options.seed)
        self._config = EngineConfig(
            model=options.model or MODEL,
            load_format=options.load_format,
            devices=options.devices,
            layouts=tuple(layouts),
            policy="static",
            max_num_seqs=-(-options.streams // options.devices) * 2 + 1,
        )
        self._names = itertools.count()

    def __enter__(self) -> _Bench:
        from fly_jax.engine.loader import load_model
        from fly_jax.engine.thread import EngineThread

        with LoadProgress(enabled=True) as bar:
            self._model = load_model(self._config, bar.report)
        self._thread: EngineThread = EngineThread(self._model.engine())
        self._addresses = self._weight_addresses()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _weight_addresses(self) -> dict[int, int]:
        weights, groups = self._model.runner.weights, self._model.plan.groups
        return {address: size for group in groups for address, size in weights.addresses(group).items()}

    @property
    def weight_bytes_moved(self) -> int:
        """Bytes of weights that are elsewhere now than at the start."""
        now = self._weight_addresses()
        return sum(size for address, size in now.items() if address not in self._addresses)

    @property
    def relayout_ms(self) -> dict[int, float]:
        """One launch of a relayout program by the degree of the wider group, as measured at warm-up."""
        from fly_jax.engine.step_times import step_times_of

        seconds = step_times_of(self._model.runner.info.step_seconds).relayout
        return {degree: 1e3 * each for degree, each in seconds.items()}

    def measure(self, case: Case) -> Outcome:
        """Switches twice, the second time with requests that arrive meanwhile."""
        quiet, disturbed = self._switch(case, newcomers=0), self._switch(case, newcomers=self._devices)
        newcomer_ttft = statistics.median(each.times[0] - disturbed.asked for each in disturbed.newcomers)
        widest = max(Layout.parse(text, self._devices).widest for text in (case.source, case.target))
        return _outcome(quiet, self.relayout_ms[widest], newcomer_ttft, disturbed.report.tokens_recomputed)

    def _switch(self, case: Case, newcomers: int) -> _Switched:
        self._thread.switch(case.source, SwitchStrategy.MIGRATE).result(TIMEOUT_SECONDS)
        arrivals: queue.SimpleQueue[_Stream | EngineDeadError] = queue.SimpleQueue()
        lengths = [TOKENS_BEFORE + TOKENS_AFTER + MORE_TOKENS_EACH * index for index in range(self._streams)]
        streams = [self._start(arrivals, tokens) for tokens in lengths]
        _take_until(arrivals, lambda: all(len(stream.times) >= TOKENS_BEFORE for stream in streams))
        asked = time.perf_counter()
        wish = self._thread.switch(case.target, case.strategy)
        arrived = [self._start(arrivals, TOKENS_AFTER) for _ in range(newcomers)]
        number = wish.result(TIMEOUT_SECONDS).number
        done = time.perf_counter()
        _take_until(arrivals, lambda: all(stream.finished for stream in (*streams, *arrived)))
        history = self._thread.stats().result(TIMEOUT_SECONDS).switch_history
        return _Switched(asked, done, next(each for each in history if each.number == number), streams, arrived)

    def _start(self, arrivals: queue.SimpleQueue[_Stream | EngineDeadError], tokens: int) -> _Stream:
        stream = _Stream(arrivals)
        prompt = [self._random.randrange(self._model.plan.model_config.vocab_size) for _ in range(self._length())]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
        self._thread.submit(f"bench-{next(self._names)}", prompt, params, stream, bounded=False).result(TIMEOUT_SECONDS)
        return stream

    def _length(self) -> int:
        return self._random.randint(*PROMPT_TOKENS)


def _take_until(arrivals: queue.SimpleQueue[_Stream | EngineDeadError], done: Any) -> None:
    while not done():
        item = arrivals.get(timeout=TIMEOUT_SECONDS)
        if isinstance(item, EngineDeadError):
            raise item


def _outcome(switched: _Switched, relayout_ms: float, newcomer_ttft: float, tokens_recomputed: int) -> Outcome:
    report = switched.report
    before, after = (statistics.median(gaps) if gaps else 0.0 for gaps in switched.gaps)
    return Outcome(
        drain_ms=1e3 * report.drain_seconds,
        precopy_ms=1e3 * report.precopy_seconds,
        cutover_ms=1e3 * report.cutover_seconds,
        total_ms=1e3 * (switched.done - switched.asked),
        worst_gap_ms=1e3 * report.worst_gap_seconds,
        gap_before_ms=before,
        gap_after_ms=after,
        gap_limit_ms=ACCEPTED_GAPS * max(before, after) + report.relayout_launches * relayout_ms,
        newcomer_ttft_ms=1e3 * newcomer_ttft,
        kv_bytes_moved=report.kv_bytes_moved,
        kv_bytes_precopied=report.kv_bytes_precopied,
        tokens_recomputed=tokens_recomputed,
        requests_moved=report.requests_moved,
        requests_paused=report.requests_paused,
    )


def _median(outcomes: Sequence[Outcome]) -> Outcome:
    values = {
        field.name: statistics.median(getattr(each, field.name) for each in outcomes) for field in fields(Outcome)
    }
    return Outcome(**values)


def _print(
    console: Console,
    measured: dict[Case, list[Outcome]],
    relayout_ms: dict[int, float],
    options: argparse.Namespace,
) -> None:
    title = f"{options.streams} streams, {options.devices} devices, median of {options.repeat}; times in ms"
    table = Table(title=title)
    for heading in ("switch", "strategy"):
        table.add_column(heading)
    for heading in ("drain", "ahead", "cutover", "worst gap", "limit", "newcomer", "total", "KV MB", "recomputed"):
        table.add_column(heading, justify="right")
    last: tuple[str, str] | None = None
    for case, outcomes in measured.items():
        each, pair = _median(outcomes), (case.source, case.target)
        table.add_row(
            f"{short_layout(case.source, 0)} -> {short_layout(case.target, 0)}" if pair != last else "",
            str(case.strategy),
            *(f"{value:.1f}" for value in (each.drain_ms, each.precopy_ms, each.cutover_ms, each.worst_gap_ms)),
            *(f"{value:.1f}" for value in (each.gap_limit_ms, each.newcomer_ttft_ms, each.total_ms)),
            f"{each.kv_bytes_moved / 1e6:.1f}",
            f"{each.tokens_recomputed:.0f}",
            end_section=case.strategy is SwitchStrategy.HARD_PREEMPT,
        )
        last = pair
    console.print(table)
    _print_summary(console, measured, relayout_ms)
    console.print(
        "ahead: KV copied while the old groups go on; limit of the worst gap: three median gaps, and the relayout "
        "programs; newcomer: median time to first token of requests that arrive with the switch, one a device; "
        "recomputed: in that case"
    )


def _print_summary(console: Console, measured: dict[Case, list[Outcome]], relayout_ms: dict[int, float]) -> None:
    for strategy in SwitchStrategy:
        runs = [each for case, outcomes in measured.items() if case.strategy is strategy for each in outcomes]
        if runs:
            cutovers = [each.cutover_ms for each in runs]
            console.print(
                f"{strategy}: cutover median {statistics.median(cutovers):.2f} ms, slowest {max(cutovers):.2f} ms, "
                f"worst gap median {statistics.median(each.worst_gap_ms for each in runs):.1f} ms, "
                f"{sum(each.worst_gap_ms <= each.gap_limit_ms for each in runs)} of {len(runs)} within the limit"
            )
    launches = ", ".join(f"{each:.2f} ms on {degree} devices" for degree, each in relayout_ms.items())
    console.print(f"one relayout launch: {launches}")
