from __future__ import annotations

import logging

from fly_jax.host.log_limit import MOST_IN_WINDOW, WINDOW_SECONDS, LogLimit


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_place_in_the_code_writes_so_many_lines_and_then_says_how_many_it_left_out() -> None:
    clock, handler, logger = Clock(), Lines(), logging.Logger("test", logging.DEBUG)
    handler.addFilter(LogLimit(clock))
    logger.addHandler(handler)

    def warn(name: str) -> None:
        logger.warning("%s was refused", name)

    for number in range(100_000):
        warn(f"client {number}")
    assert len(handler.lines) == MOST_IN_WINDOW
    logger.warning("another place is free to speak")
    assert handler.lines.pop() == "another place is free to speak"
    clock.now = WINDOW_SECONDS
    warn("100%s")
    assert handler.lines.pop() == f"100%s was refused ({100_000 - MOST_IN_WINDOW} more like this were left out before)"
    warn("the next")
    assert handler.lines.pop() == "the next was refused"


def test_the_end_of_a_flood_is_told_by_whoever_writes_next() -> None:
    clock, handler, logger = Clock(), Lines(), logging.Logger("test", logging.DEBUG)
    handler.addFilter(LogLimit(clock))
    logger.addHandler(handler)
    for number in range(1000):
        logger.warning("client %d was refused", number)
    clock.now = WINDOW_SECONDS
    logger.error("all is well")
    said = handler.lines.pop()
    assert said.startswith(f"all is well ({1000 - MOST_IN_WINDOW} more of test, line ")
    assert said.endswith("WARNING, were left out before)")
    logger.error("all is well")
    assert handler.lines.pop() == "all is well"


def test_debugging_is_not_limited() -> None:
    handler, logger = Lines(), logging.Logger("test", logging.DEBUG)
    handler.addFilter(LogLimit())
    logger.addHandler(handler)
    for _ in range(10 * MOST_IN_WINDOW):
        logger.debug("a step")
    assert len(handler.lines) == 10 * MOST_IN_WINDOW
