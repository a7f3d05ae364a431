"""Progress on the terminal or in a notebook."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class _Bar:
    def __init__(self, enabled: bool, *columns: TextColumn | BarColumn | MofNCompleteColumn | TimeElapsedColumn) -> None:
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not enabled)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


class LoadProgress(_Bar):
    """One bar a phase: loading (in MB), compiling k of n, warming up."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(
            enabled, TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LoadProgress:
        self._bar.start()
        return self

    def report(self, phase: str, done: int, total: int) -> None:
        if phase == "loading":
            done, total = round(done / 1e6), round(total / 1e6)
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=max(1, total))
        self._bar.update(self._tasks[phase], completed=min(done, total) if total else 1)


class GenerationProgress(_Bar):
    """Requests finished and tokens so far."""

    def __init__(self, requests: int, enabled: bool) -> None:
        super().__init__(
            enabled, TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]} tokens"),
            TimeElapsedColumn(),
        )  # fmt: skip
        self._requests = requests
        self._tokens = 0
        self._task: TaskID | None = None

    def __enter__(self) -> GenerationProgress:
        self._bar.start()
        self._task = self._bar.add_task("requests", total=self._requests, tokens=0)
        return self

    def update(self, tokens: int, finished: bool) -> None:
        assert self._task is not None
        self._tokens += tokens
        self._bar.update(self._task, advance=1 if finished else 0, tokens=self._tokens)
