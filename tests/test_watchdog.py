"""The watchdog sees what stands still and lets through what does not."""

from __future__ import annotations

import threading

import pytest

from tests.watchdog import watched


def test_a_result_and_an_error_come_through() -> None:
    assert watched(lambda: 7, progress=lambda: 0) == 7
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0, progress=lambda: 0)


def test_work_that_stands_still_is_given_up() -> None:
    forever = threading.Event()
    with pytest.raises(AssertionError, match="no progress"):
        watched(forever.wait, progress=lambda: 3, patience=0.05)
    forever.set()


def test_slow_work_that_goes_on_is_not() -> None:
    ticks = iter(range(1000))
    end = threading.Event()
    threading.Timer(0.3, end.set).start()
    assert watched(end.wait, progress=lambda: next(ticks), patience=0.05)
