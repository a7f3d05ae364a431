"""Progress on the terminal or, where ipywidgets is installed, in a notebook; plain lines anywhere else."""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

_LINES_A_PHASE = 5


class _Bar:
    def __init__(self, enabled: bool, *columns: ProgressColumn) -> None:
        self._console = Console(stderr=True)
        if self._console.is_jupyter and find_spec("ipywidgets") is None:
            # rich would draw nothing and warn about it each time, though a notebook's stderr claims to be a terminal.
            self._console = Console(stderr=True, force_jupyter=False, force_terminal=False)
        self._enabled = enabled
        self._live = enabled and (self._console.is_terminal or self._console.is_jupyter)
        self._bar = Progress(*columns, console=self._console, disable=not self._live)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


class LoadProgress(_Bar):
    """One bar a phase: measuring (accelerators only), loading (in MB), compiling k of n programs, warming up."""

    def __init__(self, enabled: bool) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(enabled, *columns)
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, int] = {}

    def __enter__(self) -> LoadProgress:
        self._bar.start()
        return self

    def report(self, phase: str, done: int, total: int) -> None:
        if phase == "loading":
            done, total = -(-done // 10**6), -(-total // 10**6)
        if self._enabled and not self._live:
            self._print_line(phase, done, total)
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=total)
        self._bar.update(self._tasks[phase], completed=done)

    def _print_line(self, phase: str, done: int, total: int) -> None:
        line = done * _LINES_A_PHASE // max(1, total)
        if line > self._lines.get(phase, 0):
            self._lines[phase] = line
            self._console.print(f"{phase} {done} of {total}" + (" MB" if phase == "loading" else ""), highlight=False)


class GenerationProgress(_Bar):
    """Requests finished and tokens so far."""

    def __init__(self, requests: int, enabled: bool) -> None:
        tokens = TextColumn("{task.fields[tokens]} tokens")
        super().__init__(
            enabled, TextColumn("requests"), BarColumn(), MofNCompleteColumn(), tokens, TimeElapsedColumn()
        )
        self._requests = requests
        self._tokens = 0
        self._task = TaskID(0)

    def __enter__(self) -> GenerationProgress:
        self._bar.start()
        self._task = self._bar.add_task("requests", total=self._requests, tokens=0)
        return self

    def update(self, tokens: int, finished: bool) -> None:
        self._tokens += tokens
        self._bar.update(self._task, advance=1 if finished else 0, tokens=self._tokens)
