"""How much device memory steps take besides weights and KV, read from compiled programs.

The largest program of each kind stands for its smaller buckets, and one group for all of its size: memory grows with
the bucket, and groups of one size run the same program on other devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import jax

from fly_jax.device.packing import StepShapes
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.launch import ExecutableKey
from fly_jax.scheduling.runner import STEPS_IN_FLIGHT


def largest_keys(shapes: StepShapes, groups: Collection[DeviceGroup]) -> list[ExecutableKey]:
    """The largest program of each kind for the first group of each size, and one relayout for each pair of degrees."""
    one_a_size = {group.tp: group for group in reversed(tuple(groups))}
    largest = [key for _, group in sorted(one_a_size.items()) for key in _largest_of_each_kind(shapes, group)]
    # Not only of the first groups: one whose devices form no narrower group moves no KV, while the next may.
    relayouts = {key.splits: key for key in reversed(tuple(shapes.relayout_keys(groups)))}
    return largest + list(relayouts.values())


def _largest_of_each_kind(shapes: StepShapes, group: DeviceGroup) -> Iterable[ExecutableKey]:
    keys = sorted(shapes.keys(group), key=lambda key: key.bucket)
    return {key.kind: key for key in keys}.values()


def working_bytes(programs: Iterable[jax.stages.Compiled]) -> int:
    """Bytes of one device that must stay free for any of these programs to run behind any other."""
    temporaries, results = 0, 0
    for program in programs:
        memory = program.memory_analysis()
        assert memory is not None, "this backend has no memory analysis"
        temporaries = max(temporaries, memory.temp_size_in_bytes)
        results = max(results, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    # Results of all steps in flight are there at once. Temporaries are not counted twice: the allocator gives them back
    # in the order of the device's stream.
    return temporaries + STEPS_IN_FLIGHT * results
