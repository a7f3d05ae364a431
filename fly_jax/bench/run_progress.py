"""How far a load run is, on the terminal; plain lines where output is not a screen."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Drawing takes milliseconds in which no request leaves on time.
REFRESHES_A_SECOND = 2
LINES_A_RUN = 4


class RunProgress:
    """Requests that have ended, on standard error."""

    def __init__(self, requests: int, enabled: bool = True) -> None:
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._live = enabled and self._console.is_terminal
        columns = (
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=self._console, refresh_per_second=REFRESHES_A_SECOND, disable=not self._live
        )
        self._task = self._bar.add_task("requests", total=requests)
        self._requests = requests
        self._done = 0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def request_ended(self) -> None:
        self._done += 1
        if self._live:
            self._bar.advance(self._task)
        elif self._enabled and self._quarter(self._done) > self._quarter(self._done - 1):
            self._console.print(f"{self._done} of {self._requests} requests", highlight=False)

    def _quarter(self, done: int) -> int:
        return done * LINES_A_RUN // self._requests
