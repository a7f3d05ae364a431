"""The process environment and the threads of virtual CPU devices, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PRIORITIES = """
import contextlib, os, threading
from fly_jax.platform import configure_devices, start_devices
configure_devices(2)
started = start_devices()
mine = {thread.native_id for thread in threading.enumerate()}
niceness = {}
for thread in map(int, os.listdir("/proc/self/task")):
    with contextlib.suppress(ProcessLookupError):  # XLA's threads for compiling end at any time
        niceness[thread] = os.getpriority(os.PRIO_PROCESS, thread)
own = os.getpriority(os.PRIO_PROCESS, 0)
assert {niceness[thread] for thread in mine} == {own}
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
