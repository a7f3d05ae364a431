"""Notices that an engine's thread finishes no step although there is work. Pure Python, no JAX."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

logger = logging.getLogger(__name__)

# A step may take so many times what the slowest took alone at warm-up before it counts as stuck: virtual devices
# share the host's cores, and each of several groups has two steps in flight.
SLOWEST_STEPS = 30
CHECKS_PER_TIMEOUT = 10
LONGEST_WAIT_SECONDS = 5.0


class Watchdog:
    """Times how long an engine with work has finished no step.

    The engine's thread calls :meth:`working`, :meth:`finished_step` and :meth:`idle`, which only set one value;
    everybody may ask for :meth:`stuck_seconds` without waiting for that thread.

    Args:
        timeout: seconds; 0: never stuck.
        slowest_step: seconds of the slowest step at warm-up, which may make the timeout longer.
        clock: seconds, real or virtual.
    """

    def __init__(self, timeout: float, slowest_step: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = max(timeout, SLOWEST_STEPS * slowest_step) if timeout else 0.0
        self._clock = clock
        self._since: float | None = None
        self._reported: float | None = None
        self._ended = threading.Event()

    # -- on the engine's thread -------------------------------------------------------------------------------

    def working(self) -> None:
        """There is work; time counts from here unless it does already."""
        if self._since is None:
            self._since = self._clock()

    def finished_step(self) -> None:
        self._since = self._clock()

    def idle(self) -> None:
        """There is nothing to do."""
        self._since = None

    # -- on any thread ----------------------------------------------------------------------------------------

    def stuck_seconds(self) -> float | None:
        """For how long no step has finished, once that is longer than the limit; None: all is well."""
        since = self._since
        if since is None or not self.limit:
            return None
        seconds = self._clock() - since
        return seconds if seconds > self.limit else None

    def check(self, thread_id: int | None) -> None:
        """Logs where the engine's thread is, once each time that it gets stuck, and that it goes on."""
        since, seconds = self._since, self.stuck_seconds()
        if seconds is None:
            if self._reported is not None and since != self._reported:
                logger.warning("the engine finishes steps again")
                self._reported = None
        elif since != self._reported:
            self._reported = since
            logger.error(
                "the engine has finished no step for %.0f s although there is work (--engine-timeout); its thread is "
                "at:\n%s", seconds, stack_of(thread_id),
            )  # fmt: skip

    def watch(self, thread: threading.Thread) -> None:
        """Checks now and then until the thread or :meth:`end` ends it; on a thread of its own."""
        if not self.limit:
            return
        pause = min(self.limit / CHECKS_PER_TIMEOUT, LONGEST_WAIT_SECONDS)

        def run() -> None:
            while not self._ended.wait(pause) and thread.is_alive():
                self.check(thread.ident)

        threading.Thread(target=run, name="fly-jax-watchdog", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()


def stack_of(thread_id: int | None) -> str:
    """The lines at which a thread is, outermost first."""
    frame = sys._current_frames().get(thread_id) if thread_id is not None else None
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(the thread has ended)"
