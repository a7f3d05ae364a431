"""A benchmark that is told to end stops what it started; ``test_serve`` has a server that is started and stopped."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from fly_jax.bench.self_hosted import ENDING_SIGNALS, started, stopping_on_signals

# Stands for the benchmark: it says when it can be told to end, and that what it started has been stopped.
BENCHMARK = """
import signal, sys
from fly_jax.bench.self_hosted import stopping_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN if "ignored" in sys.argv else signal.SIG_DFL)
with stopping_on_signals():
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    finally:
        signal.raise_signal(signal.SIGHUP)
        print("stopped", flush=True)
"""


def told(number: int, *arguments: str) -> tuple[int, str]:
    """What such a process ends with when it gets this signal and then a line, and what it prints after that."""
    command = [sys.executable, "-c", BENCHMARK, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        printed, _ = process.communicate("go on\n", timeout=120)
    return process.returncode, printed


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_to_end_stops_the_server_first_even_if_a_hangup_follows(number: signal.Signals) -> None:
    assert told(number) == (128 + number, "stopped\n")


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    assert told(signal.SIGHUP, "ignored") == (0, "stopped\n")


def test_what_a_signal_did_before_it_does_afterwards() -> None:
    before = [signal.getsignal(each) for each in ENDING_SIGNALS]
    with stopping_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(each) for each in ENDING_SIGNALS] == before
    with pytest.raises(SystemExit) as ended, stopping_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(each) for each in ENDING_SIGNALS] == before


def test_in_another_thread_signals_are_left_alone() -> None:
    """Only the main thread may handle them."""
    entered = []

    def enter() -> None:
        with stopping_on_signals():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


def test_a_limit_of_open_files_is_the_child_s_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    with started([sys.executable, "-c", told], 64, {"stdout": subprocess.PIPE}) as process:
        printed, _ = process.communicate(timeout=120)
    assert int(printed) == 64
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
