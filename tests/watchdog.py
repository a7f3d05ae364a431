"""Runs work that could hang, and says where it hangs."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

T = TypeVar("T")

# Far beyond the slowest step of a loaded machine: only something that waits for ever takes this long.
PATIENCE_SECONDS = 120.0


def watched(work: Callable[[], T], progress: Callable[[], int], patience: float = PATIENCE_SECONDS) -> T:
    """Runs ``work`` on a thread of its own; fails, with every thread's stack, when ``progress()`` stands still."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="watched", daemon=True).start()
    seen = progress()
    while True:
        try:
            return result.result(timeout=patience)
        except NotYet:
            if result.done():
                raise
            if progress() == seen:
                faulthandler.dump_traceback()
                raise AssertionError(f"no progress in {patience:.0f} s after {seen}: a deadlock?") from None
            seen = progress()
