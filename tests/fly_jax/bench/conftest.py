from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def python_s_sigint() -> Iterator[None]:
    """The handler that a command starts with; workers of a parallel test run may have another."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
