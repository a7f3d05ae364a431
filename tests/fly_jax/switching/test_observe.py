from __future__ import annotations

import dataclasses

from fly_jax.layout import DeviceGroup, Layout
from fly_jax.policy.observation import RequestLoad
from fly_jax.sampling_params import SamplingParams
from fly_jax.switching.observe import WAITING_SEEN, load_of
from tests.fly_jax.simulated_runner import simulated_engine


def test_a_load_shows_running_waiting_and_paused_requests() -> None:
    engine, _ = simulated_engine(layout="2+2")
    engine.add_request("normal", [1] * 8, SamplingParams(max_tokens=20, ignore_eos=True))
    wide = SamplingParams(max_tokens=30, ignore_eos=True, tensor_parallel_size=2, priority=-3)
    engine.add_request("wide", [1] * 8, wide)
    engine.step()
    scheduler = engine.scheduler
    paused, group = scheduler.requests["wide"], scheduler.requests["wide"].held_table.group
    scheduler.groups[group].running.remove(paused)
    scheduler.pause(paused)
    engine.add_request("late", [1] * 5, SamplingParams(max_tokens=7))
    load = load_of(scheduler, (3.0, 4.0), 9.0, 8.0)
    assert (load.now, load.last_switch, load.prompt_rate, load.output_rate) == (9.0, 8.0, 3.0, 4.0)
    assert load.layout == Layout.parse("2+2", 4)
    other = DeviceGroup(2 - group.start, 2)
    running = RequestLoad(scheduler.requests["normal"].num_tokens, 1, 28)
    assert {each.group: each.running for each in load.groups} == {group: (), other: (running,)}
    assert {each.group: each.free_blocks for each in load.groups} == {
        each: engine.kv.free_blocks(each) for each in (group, other)
    }
    assert load.waiting == (RequestLoad(5, 5, 12),)
    assert load.paused == (RequestLoad(paused.num_tokens, 1, 38, 2, -3, group),)
    assert list(load.requests()) == [(running, other), (load.paused[0], group), (load.waiting[0], None)]


def test_a_long_queue_is_seen_by_its_head() -> None:
    engine, _ = simulated_engine(max_queued=1000)
    for index in range(WAITING_SEEN + 50):
        engine.add_request(f"r{index}", [1] * (1 + index % 9), SamplingParams(max_tokens=4))
    load = load_of(engine.scheduler, (0.0, 0.0), 0.0, None)
    assert len(load.waiting) == WAITING_SEEN
    assert load.waiting[:3] == tuple(RequestLoad(n, n, n + 4) for n in (1, 2, 3))


def test_a_request_that_needs_width_is_seen_wherever_it_waits() -> None:
    engine, _ = simulated_engine(max_queued=1000)
    low = SamplingParams(max_tokens=4, priority=1)
    engine.add_request("oldest", [1] * 3, low)
    engine.add_request("other", [1] * 3, low)
    engine.add_request("wide", [1] * 3, dataclasses.replace(low, tensor_parallel_size=1))
    engine.scheduler.requests["wide"].min_width = 4
    for index in range(WAITING_SEEN + 50):
        engine.add_request(f"r{index}", [1] * 5, SamplingParams(max_tokens=4))
    load = load_of(engine.scheduler, (0.0, 0.0), 0.0, None)
    assert [each.min_width for each in load.waiting[WAITING_SEEN:]] == [1, 4]
