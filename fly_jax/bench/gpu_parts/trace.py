"""Traces of the jax profiler, by kernel."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from jax.profiler import ProfileData

# Of the instances of one fusion or one custom call.
_NUMBER = re.compile(r"\.\d+$")


def seconds_by_kernel(folder: Path) -> Counter[str]:
    """Seconds of each kernel on the device, all its calls together; operations of XLA where only a CPU computes.

    Args:
        folder: that ``jax.profiler.trace`` wrote to.
    """
    found = Counter[str]()
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            on_gpu = plane.name.startswith("/device:GPU")
            for line in plane.lines:
                if on_gpu and not line.name.startswith("Stream"):
                    continue  # the same again, by module and by operation
                if not on_gpu and not (plane.name == "/host:CPU" and "XLA" in line.name):
                    continue
                for event in line.events:
                    found[_NUMBER.sub("", event.name)] += event.duration_ns / 1e9
    return found
