"""Bounds on how much a log grows by what strangers do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 10.0
MOST_IN_WINDOW = 20

# Where a line is written: logger, level, file, line.
Place = tuple[str, int, str, int]


@dataclass(slots=True)
class _Window:
    until: float
    passed: int = 0
    left_out: int = 0


class LogLimit(logging.Filter):
    """Lets each place in the code write so many lines in a window, and says how many it left out.

    It says so with the first line that is written after the window, by that place or by another. By the place and not
    by the text, which may hold what a client sent. Debugging is not limited.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[Place, _Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        place = (record.name, record.levelno, record.pathname, record.lineno)
        with self._lock:
            over = self._take_over()
            window = self._windows.setdefault(place, _Window(self._clock() + WINDOW_SECONDS))
            if window.passed == MOST_IN_WINDOW:
                window.left_out += 1
                return False
            window.passed += 1
        notes = [_note(each, window.left_out, here=each == place) for each, window in over.items() if window.left_out]
        if notes:
            record.msg, record.args = f"{record.getMessage()} ({'; '.join(notes)})", None
        return True

    def _take_over(self) -> dict[Place, _Window]:
        """The windows that have ended, no longer kept."""
        now = self._clock()
        over = {place: window for place, window in self._windows.items() if now >= window.until}
        for place in over:
            del self._windows[place]
        return over


def _note(place: Place, left_out: int, here: bool) -> str:
    name, level, _, line = place
    what = "like this" if here else f"of {name}, line {line}, {logging.getLevelName(level)},"
    return f"{left_out} more {what} were left out before"
