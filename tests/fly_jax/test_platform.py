"""The process environment and the threads of virtual CPU devices, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRIORITIES = """
import contextlib, os, threading
from fly_jax.platform import configure_devices, start_devices
configure_devices(2)
started = start_devices()
mine = {thread.native_id for thread in threading.enumerate()}  # on a busy host, a timer of jax's among them
niceness = {}
for thread in map(int, os.listdir("/proc/self/task")):
    with contextlib.suppress(ProcessLookupError):  # XLA's threads for compiling end at any time
        niceness[thread] = os.getpriority(os.PRIO_PROCESS, thread)
own = os.getpriority(os.PRIO_PROCESS, 0)
assert {niceness[thread] for thread in mine if thread in niceness} == {own}
devices = [value for thread, value in niceness.items() if thread not in mine]
assert sum(value > own for value in devices) >= 4 * len(started), devices
later = threading.Thread(target=lambda: print(os.getpriority(os.PRIO_PROCESS, 0) - own))
later.start(); later.join()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have their own priorities on Linux alone")
def test_threads_that_compute_for_cpu_devices_give_way_to_all_others() -> None:
    done = subprocess.run([sys.executable, "-c", PRIORITIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize("given", [{}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}])
def test_jax_gets_most_of_a_gpu_s_memory_unless_the_user_says_otherwise(given: dict[str, str]) -> None:
    """Never under both names, with which jax refuses to start."""
    read = (
        "import os; from fly_jax.platform import configure_devices; configure_devices(1)\n"
        "print({name: value for name, value in os.environ.items() if name.endswith('_MEM_FRACTION')})"
    )
    others = {name: value for name, value in os.environ.items() if not name.endswith("_MEM_FRACTION")}
    done = subprocess.run([sys.executable, "-c", read], env=others | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(given or {"XLA_CLIENT_MEM_FRACTION": "0.95"})
