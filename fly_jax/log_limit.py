"""Bounds on how much a log grows by what strangers do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 10.0
MOST_IN_WINDOW = 20


@dataclass(slots=True)
class _Window:
    until: float
    passed: int = 0
    left_out: int = 0


class LogLimit(logging.Filter):
    """Lets each place in the code write so many lines in a window, and says with the next one how many it left out.

    By the place and not by the text, which may hold what a client sent. Debugging is not limited.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int, str, int], _Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        place = (record.name, record.levelno, record.pathname, record.lineno)
        with self._lock:
            now = self._clock()
            window = self._windows.get(place)
            left_out = 0
            if window is None or now >= window.until:
                left_out = 0 if window is None else window.left_out
                window = self._windows[place] = _Window(now + WINDOW_SECONDS)
            if window.passed == MOST_IN_WINDOW:
                window.left_out += 1
                return False
            window.passed += 1
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like this were left out before)", None
        return True
