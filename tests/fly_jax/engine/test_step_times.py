from __future__ import annotations

from fly_jax.engine.step_times import step_times_of
from fly_jax.kv.slabs import HeadSplits
from fly_jax.layout import DeviceGroup
from fly_jax.policy.observation import StepTimes
from fly_jax.scheduling.launch import ExecutableKey, StepKind

FIRST, SECOND, BOTH = DeviceGroup(0, 1), DeviceGroup(1, 1), DeviceGroup(0, 2)


def test_step_times_are_those_of_whole_steps_by_degree_in_the_slowest_group() -> None:
    times = step_times_of(
        {
            ExecutableKey(FIRST, StepKind.DECODE, 8): 1.0,
            ExecutableKey(SECOND, StepKind.DECODE, 8): 2.0,
            ExecutableKey(FIRST, StepKind.DECODE, 32): 4.0,
            ExecutableKey(FIRST, StepKind.HEAD, 8): 0.5,
            ExecutableKey(SECOND, StepKind.HEAD, 8): 0.25,
            ExecutableKey(FIRST, StepKind.HEAD, 32): 0.75,
            ExecutableKey(FIRST, StepKind.MIXED, 128): 8.0,
            ExecutableKey(SECOND, StepKind.MIXED, 128): 7.0,
            ExecutableKey(FIRST, StepKind.SCORE, 128): 100.0,
            ExecutableKey(BOTH, StepKind.DECODE, 8): 0.5,
            ExecutableKey(BOTH, StepKind.HEAD, 8): 0.125,
            ExecutableKey(BOTH, StepKind.RELAYOUT, 16, HeadSplits(1, 2)): 0.01,
            ExecutableKey(BOTH, StepKind.RELAYOUT, 16, HeadSplits(2, 1)): 0.02,
        }
    )
    assert times == StepTimes(
        decode={1: {8: 2.5, 32: 4.75}, 2: {8: 0.625}},
        mixed={1: {128: 8.75}},
        relayout={2: 0.02},
    )


def test_without_measurements_there_are_no_step_times() -> None:
    assert step_times_of({}) == StepTimes({}, {}, {})
