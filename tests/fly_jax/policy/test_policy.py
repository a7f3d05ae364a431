from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.policy.adaptive import (
    HIGH,
    LOW,
    MIN_DWELL,
    POLICIES,
    Decision,
    DecisionKind,
    load_adaptive,
    static,
    switch_seconds,
)
from fly_jax.policy.arrival_rates import LoadEstimator
from fly_jax.policy.candidates import needs_of
from fly_jax.policy.observation import GroupLoad, Load, Machine, RequestLoad, StepTimes
from fly_jax.policy.utilisation import Capacity, demands
from fly_jax.scheduling.step import SchedulerLimits

BLOCKS, BLOCK_SIZE, KV_HEADS = 64, 16, 8
ONE_DEVICE = BLOCKS * BLOCK_SIZE  # tokens
LAUNCH_SECONDS = 2e-4


def step_seconds(degree: int, tokens: int, *, all_reduce: float = 2e-5) -> float:
    """An 8B model on H200s, roughly: reading the weights, computing each token, all-reduces.

    Prompts: 19, 21, 30 thousand tokens a second in a group of 1, 2, 4, so 77, 43, 30 thousand on four devices.
    """
    shared = (6e-3 + 4e-5 * tokens) / degree
    return shared + (4e-4 + all_reduce * tokens if degree > 1 else 0.0)


def make_machine(
    num_devices: int = 4,
    base_tp: int = 1,
    layouts: Iterable[str] | None = None,
    *,
    all_reduce: float = 2e-5,
    untimed: Sequence[int] = (),
) -> Machine:
    """A machine with programs for these layouts, or all."""
    groups = set(all_groups(num_devices, base_tp))
    if layouts is not None:
        groups = {group for text in layouts for group in Layout.parse(text, num_devices, base_tp).groups}
    degrees = {group.tp for group in groups} - {*untimed}
    table = {
        kind: {
            degree: {size: step_seconds(degree, size, all_reduce=all_reduce) for size in sizes(degree)}
            for degree in degrees
        }
        for kind, sizes in {
            "decode": lambda degree: (8, 32 * degree // base_tp),
            "mixed": lambda degree: (128, 512),  # noqa: ARG005
        }.items()
    }
    return Machine(
        num_devices=num_devices,
        base_tp=base_tp,
        groups=frozenset(groups),
        kv=KVCacheSpec(BLOCKS, BLOCK_SIZE, num_layers=2, kv_heads=KV_HEADS, head_dim=16, bytes_per_element=2),
        limits=SchedulerLimits(32, 512),
        step_times=StepTimes(table["decode"], table["mixed"], dict.fromkeys(degrees, LAUNCH_SECONDS)),
    )


def short(tokens: int = 60, **options: int) -> RequestLoad:
    """A request that decodes."""
    return RequestLoad(tokens, 1, tokens + 100, **options)


def prompt(tokens: int, output: int = 100, **options: int) -> RequestLoad:
    """A request that waits."""
    return RequestLoad(tokens, tokens, tokens + output, **options)


def make_load(
    layout: str,
    running: dict[int, list[RequestLoad]] | None = None,
    waiting: Iterable[RequestLoad] = (),
    *,
    num_devices: int = 4,
    since_switch: float | None = None,
    **options: object,
) -> Load:
    """A load in which ``running`` are the requests of the groups that start at these devices."""
    parsed, now = Layout.parse(layout, num_devices), 1000.0
    return Load(
        now=now,
        layout=parsed,
        groups=tuple(GroupLoad(group, tuple((running or {}).get(group.start, ())), 0) for group in parsed.groups),
        waiting=tuple(waiting),
        last_switch=None if since_switch is None else now - since_switch,
        **options,  # type: ignore[arg-type]
    )


def outcome(load: Load, machine: Machine) -> str:
    """The layout after the decision."""
    return str(load_adaptive(load, machine).target or load.layout)


def utilisation(layout: str, load: Load, machine: Machine) -> float:
    found = Layout.parse(layout, machine.num_devices)
    return Capacity(machine).utilisations([found], demands(load, needs_of(load, machine)))[found]


# -- as wide as the load allows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_devices", "base_tp", "start", "wide"),
    [
        (1, 1, "1", "1"),
        (2, 1, "1+1", "2"),
        (4, 1, "1+1+1+1", "4"),
        (4, 1, "2+1+1", "4"),
        (4, 2, "2+2", "4"),
        (6, 1, "1+1+1+1+1+1", "4+2"),
        (8, 1, "1+1+1+1+1+1+1+1", "8"),
        (8, 2, "2+2+2+2", "8"),
        (8, 8, "8", "8"),
    ],
)
def test_a_low_load_goes_as_wide_as_the_devices_allow(num_devices: int, base_tp: int, start: str, wide: str) -> None:
    load = make_load(start, {0: [short()]}, num_devices=num_devices, prompt_rate=100.0, output_rate=100.0)
    machine = make_machine(num_devices, base_tp)
    decision = load_adaptive(load, machine)
    assert str(decision.target or load.layout) == wide
    assert decision.kind is (DecisionKind.HOLD if start == wide else DecisionKind.WIDEN)


@pytest.mark.parametrize("since_switch", [None, 0.1, 100.0])
@pytest.mark.parametrize(
    ("num_devices", "base_tp", "start", "narrow"),
    [
        (2, 1, "2", "1+1"),
        (4, 1, "4", "1+1+1+1"),
        (4, 1, "2+2", "1+1+1+1"),
        (4, 2, "4", "2+2"),
        (8, 1, "8", "1+1+1+1+1+1+1+1"),
        (8, 2, "8", "2+2+2+2"),
    ],
)
def test_a_burst_goes_narrow_at_once(
    num_devices: int, base_tp: int, start: str, narrow: str, since_switch: float | None
) -> None:
    burst = [prompt(500) for _ in range(256)]
    load = make_load(start, {0: [short()]}, burst, num_devices=num_devices, since_switch=since_switch)
    decision = load_adaptive(load, make_machine(num_devices, base_tp))
    assert (str(decision.target), decision.kind) == (narrow, DecisionKind.NARROW)
    assert start in decision.reason
    assert "% busy" in decision.reason
    assert "\n" not in decision.reason


@pytest.mark.parametrize(
    ("start", "prompt_rate", "expected"),
    [
        ("4", 20_000.0, "4"),  # 67 % busy: between LOW and HIGH nothing changes
        ("2+2", 20_000.0, "2+2"),
        ("1+1+1+1", 20_000.0, "2+2"),  # 47 % there, but 67 % in 4
        ("4", 24_000.0, "4"),
        ("4", 27_000.0, "1+1+1+1"),  # 91 % busy; 63 % in 2+2 is not below LOW, 35 % is
        ("2+2", 27_000.0, "2+2"),
        ("2+2", 45_000.0, "1+1+1+1"),  # 105 % busy; 58 % there is the least
        ("1+1+1+1", 13_000.0, "4"),  # 44 % there
    ],
)
def test_the_widest_layout_that_keeps_up_with_a_rate_of_prompts_is_chosen(
    start: str, prompt_rate: float, expected: str
) -> None:
    load = make_load(start, {0: [short()]}, prompt_rate=prompt_rate)
    assert outcome(load, make_machine()) == expected


@pytest.mark.parametrize(("since_switch", "expected"), [(MIN_DWELL - 0.1, "1+1+1+1"), (MIN_DWELL + 0.1, "4")])
def test_the_layout_is_not_widened_soon_after_a_switch(since_switch: float, expected: str) -> None:
    load = make_load("1+1+1+1", {0: [short()]}, since_switch=since_switch)
    assert outcome(load, make_machine()) == expected


def test_a_switch_that_moves_much_waits_longer() -> None:
    machine = make_machine()
    machine = replace(machine, step_times=replace(machine.step_times, relayout={2: 0.5, 4: 0.5}))
    load = make_load("1+1+1+1", {0: [short(900)]}, since_switch=5.0)
    assert load_adaptive(load, machine).target is None
    assert outcome(replace(load, last_switch=0.0), machine) == "4"


def test_the_cost_of_a_switch_grows_with_the_context_that_moves_and_ignores_groups_that_stay() -> None:
    machine = make_machine()
    few, many = (make_load("1+1+2", {0: [short(tokens)], 2: [short(900)]}) for tokens in (100, 1000))
    merged = Layout.parse("2+2", 4)
    assert switch_seconds(few, machine, merged) == pytest.approx(LAUNCH_SECONDS)
    assert switch_seconds(many, machine, merged) == pytest.approx(2 * LAUNCH_SECONDS)
    assert switch_seconds(many, machine, many.layout) == 0.0


def test_one_huge_prompt_alone_gets_the_widest_group_however_long_it_takes() -> None:
    machine = replace(make_machine(), kv=replace(make_machine().kv, num_blocks=10_000))
    load = make_load("1+1+1+1", waiting=[prompt(100_000)])
    assert outcome(load, machine) == "4"


def test_crowded_slots_keep_the_layout_narrow_where_wide_steps_are_slower_even_when_arrivals_have_stopped() -> None:
    slow_links = make_machine(all_reduce=1e-4)
    crowd = {device: [short() for _ in range(30)] for device in range(4)}
    assert outcome(make_load("1+1+1+1", crowd), slow_links) == "1+1+1+1"
    few = {0: [short(), short()]}
    assert outcome(make_load("1+1+1+1", few), slow_links) == "4"


def test_the_layout_is_not_widened_when_the_blocks_of_wide_groups_would_not_suffice() -> None:
    crowd = {
        device: [short(20) for _ in range(15)] for device in range(4)
    }  # 30 blocks of a device; 60 long ones of each in 4
    assert outcome(make_load("1+1+1+1", crowd), make_machine()) == "2+2"


@pytest.mark.parametrize("overload", [50_000.0, 500_000.0])
def test_the_best_layout_is_kept_when_nothing_keeps_up(overload: float) -> None:
    load = make_load("1+1+1+1", {0: [short()]}, prompt_rate=2 * overload)
    assert load_adaptive(load, make_machine()).kind is DecisionKind.HOLD
    decision = load_adaptive(replace(load, layout=Layout.parse("4", 4), groups=make_load("4").groups), make_machine())
    assert str(decision.target) == "1+1+1+1"


# -- wide groups for those that need them -----------------------------------------------------------------------

BUSY = 45_000.0  # prompt tokens a second that only narrow groups keep up with


def crowd(layout: str) -> dict[int, list[RequestLoad]]:
    return {group.start: [short() for _ in range(6)] for group in Layout.parse(layout, 4).groups}


@pytest.mark.parametrize(
    ("needy", "expected"),
    [
        (prompt(int(1.5 * ONE_DEVICE)), "2+1+1"),
        (prompt(60, min_width=2), "2+1+1"),
        (prompt(60, priority=-1), "2+1+1"),
        (prompt(60), "1+1+1+1"),
        (prompt(60, priority=1), "1+1+1+1"),
    ],
    ids=["long context", "hint", "priority", "short", "low priority"],
)
def test_a_request_that_needs_width_gets_a_wide_group_beside_narrow_ones(needy: RequestLoad, expected: str) -> None:
    load = make_load("1+1+1+1", crowd("1+1+1+1"), [needy], prompt_rate=BUSY, since_switch=0.0)
    decision = load_adaptive(load, make_machine())
    assert str(decision.target or load.layout) == expected
    assert decision.kind is (DecisionKind.HOLD if expected == "1+1+1+1" else DecisionKind.MAKE_ROOM)


def test_a_long_context_and_a_priority_request_share_one_wide_group_among_many_short_requests() -> None:
    needy = [prompt(int(1.2 * ONE_DEVICE)), prompt(60, priority=-5)]
    load = make_load("1+1+1+1", crowd("1+1+1+1"), needy, prompt_rate=BUSY)
    assert outcome(load, make_machine()) == "2+1+1"


def test_a_burst_leaves_the_wide_group_that_a_request_needs() -> None:
    long_context = short(int(1.5 * ONE_DEVICE))
    for layout in ("4", "2+2"):
        load = make_load(layout, {0: [long_context, *[short()] * 9]}, [prompt(500)] * 256)
        assert outcome(load, make_machine()) == "2+1+1"


def test_a_wide_group_is_kept_where_it_is() -> None:
    load = make_load("1+1+2", {2: [short(60, min_width=2)], 0: [short()]}, prompt_rate=BUSY)
    assert load_adaptive(load, make_machine()).kind is DecisionKind.HOLD


def test_half_of_the_devices_go_to_priority_requests_only_while_others_are_served() -> None:
    urgent = prompt(60, priority=-1)
    machine = make_machine(8)
    narrow = "1+1+1+1+1+1+1+1"
    alone = make_load(narrow, waiting=[urgent], num_devices=8, since_switch=0.0)
    beside = make_load(narrow, {0: [short()]}, [urgent], num_devices=8, since_switch=0.0)
    assert load_adaptive(alone, machine).kind is DecisionKind.HOLD
    assert outcome(beside, machine) == "1+1+1+1+4"


def test_the_wide_group_goes_where_the_priority_request_runs_or_else_where_least_runs() -> None:
    machine = make_machine()
    running = {0: [short()], 1: [short(priority=-1)], 2: [], 3: []}
    assert outcome(make_load("1+1+1+1", running, since_switch=0.0), machine) == "2+1+1"
    assert outcome(make_load("1+1+1+1", {0: [short()]}, [prompt(60, priority=-1)], since_switch=0.0), machine) == (
        "1+1+2"
    )


@pytest.mark.parametrize(
    ("layout", "device", "tokens", "expected"),
    [
        ("1+1+1+1", 0, ONE_DEVICE - 2 * BLOCK_SIZE, "1+1+1+1"),
        ("1+1+1+1", 0, ONE_DEVICE - 2 * BLOCK_SIZE + 1, "2+1+1"),
        ("1+1+1+1", 3, ONE_DEVICE - 1, "1+1+2"),
        ("1+1+1+1", 3, ONE_DEVICE, "1+1+2"),
        ("2+1+1", 3, ONE_DEVICE, "2+2"),
        ("2+1+1", 0, 2 * ONE_DEVICE - 1, "4"),
        ("2+1+1", 0, 2 * ONE_DEVICE - 2 * 2 * BLOCK_SIZE, "2+1+1"),
        ("4", 0, 4 * ONE_DEVICE, "4"),
    ],
)
def test_a_request_about_to_outgrow_its_group_is_widened_with_only_the_devices_it_needs(
    layout: str, device: int, tokens: int, expected: str
) -> None:
    grows = RequestLoad(tokens, 1, 10 * ONE_DEVICE)
    load = make_load(layout, {device: [grows]}, since_switch=0.0)
    decision = load_adaptive(load, make_machine())
    assert str(decision.target or load.layout) == expected
    assert decision.kind is (DecisionKind.HOLD if expected == layout else DecisionKind.MAKE_ROOM)


def test_a_request_that_will_end_before_it_outgrows_its_group_stays() -> None:
    ends = RequestLoad(ONE_DEVICE - 4, 1, ONE_DEVICE)
    load = make_load("1+1+1+1", {0: [ends]}, since_switch=0.0)
    assert load_adaptive(load, make_machine()).kind is DecisionKind.HOLD


def test_groups_that_nobody_needs_to_change_stay_when_room_is_made() -> None:
    load = make_load(
        "2+2+1+1+1+1",
        {0: [short()], 4: [RequestLoad(2 * ONE_DEVICE, 1, 10 * ONE_DEVICE)]},
        num_devices=8,
        since_switch=0.0,
    )
    assert outcome(load, make_machine(8)) == "2+2+4"


@pytest.mark.parametrize(("count", "expected"), [(1, "2+1+1+1+1+1+1"), (2, "2+2+1+1+1+1"), (3, "2+2+2+1+1")])
def test_there_are_as_many_wide_groups_as_hold_the_long_contexts(count: int, expected: str) -> None:
    waiting = [prompt(int(1.9 * ONE_DEVICE)) for _ in range(count)]
    load = make_load("1+1+1+1+1+1+1+1", waiting=waiting, num_devices=8, since_switch=0.0)
    assert outcome(load, make_machine(8)) == expected


def test_narrower_needs_use_the_room_that_wider_groups_have_left() -> None:
    waiting = [prompt(60, min_width=4), prompt(60, min_width=2)]
    load = make_load("1+1+1+1+1+1+1+1", waiting=waiting, num_devices=8, since_switch=0.0)
    assert outcome(load, make_machine(8)) == "4+1+1+1+1"


def test_a_paused_request_keeps_a_group_that_holds_its_kv_on_its_devices() -> None:
    paused = short(int(1.5 * ONE_DEVICE))._replace(holder=DeviceGroup(2, 2))
    load = make_load("4", {0: [short()]}, [prompt(500)] * 256, paused=(paused,))
    assert outcome(load, make_machine()) == "1+1+2"


def test_a_hint_wider_than_the_machine_asks_for_the_widest_there_is() -> None:
    load = make_load("1+1+1+1", waiting=[prompt(60, min_width=64)], since_switch=0.0)
    assert outcome(load, make_machine()) == "4"


def test_when_most_requests_need_width_they_get_more_than_one_group() -> None:
    hinted = [short(min_width=2) for _ in range(40)]
    load = make_load("2+1+1", {0: hinted}, prompt_rate=30_000.0)
    assert outcome(load, make_machine()) == "2+2"


def test_a_need_that_is_gone_leaves_the_wide_group_to_the_ordinary_hysteresis() -> None:
    machine = make_machine()
    normal = make_load("2+1+1", {0: [short()]}, since_switch=0.5, prompt_rate=40_000.0)
    assert utilisation("2+1+1", normal, machine) < HIGH
    assert outcome(normal, machine) == "2+1+1"
    overloaded = replace(normal, prompt_rate=55_000.0)
    assert outcome(overloaded, machine) == "2+1+1"  # a small gain waits for the dwell
    assert outcome(replace(overloaded, last_switch=0.0), machine) == "1+1+1+1"


# -- what is compiled and measured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layouts", "start", "load", "expected"),
    [
        (("1+1+1+1", "2+2"), "1+1+1+1", {}, "2+2"),
        (("1+1+1+1", "4"), "4", {"prompt_rate": 27_000.0}, "1+1+1+1"),
        (("2+2", "4"), "4", {"prompt_rate": 500_000.0}, "2+2"),
        (("2+1+1", "4"), "4", {"prompt_rate": 500_000.0}, "2+1+1"),
        (("1+1+1+1", "1+1+2"), "1+1+1+1", {"waiting": [prompt(60, min_width=2)], "since_switch": 0.0}, "1+1+2"),
        (("1+1+1+1", "4"), "1+1+1+1", {"waiting": [prompt(60, min_width=2)], "since_switch": 0.0}, "4"),
        (("1+1+1+1",), "1+1+1+1", {"waiting": [prompt(60, min_width=2)]}, "1+1+1+1"),
    ],
)
def test_only_layouts_of_compiled_groups_are_chosen(
    layouts: tuple[str, ...], start: str, load: dict[str, object], expected: str
) -> None:
    assert outcome(make_load(start, **load), make_machine(layouts=layouts)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("untimed", [(1,), (2,), (4,), (1, 2, 4)])
def test_degrees_without_step_times_are_never_chosen_freely_but_needs_are_met(untimed: tuple[int, ...]) -> None:
    machine = make_machine(untimed=untimed)
    for layout in ("1+1+1+1", "2+2", "4"):
        target = load_adaptive(make_load(layout, {0: [short()]}), machine).target
        assert target is None or set(target.degrees).isdisjoint(untimed)
    needy = make_load("1+1+1+1", waiting=[prompt(60, min_width=2)])
    assert Layout.parse(outcome(needy, machine), 4).widest >= 2


# -- no flapping ------------------------------------------------------------------------------------------------


ASK_SECONDS = 0.05


def switches(
    loads: Callable[[float, Layout], Load], machine: Machine, *, layout: str = "4", seconds: float = 40.0
) -> list[tuple[float, str]]:
    """When a policy that is asked again and again changes the layout, and to what."""
    now, last_switch, current = 0.0, None, Layout.parse(layout, machine.num_devices)
    found: list[tuple[float, str]] = []
    while now < seconds:
        decision = load_adaptive(replace(loads(now, current), now=now, last_switch=last_switch), machine)
        if decision.target is not None:
            current, last_switch = decision.target, now
            found.append((now, str(current)))
        now += ASK_SECONDS
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", ["1+1+1+1", "4"])
@pytest.mark.parametrize("level", [LOW, 0.7, HIGH, 1.0, 1.43 * LOW, 1.43 * HIGH, 2.6 * LOW, 2.6 * HIGH])
def test_a_load_that_hovers_at_a_threshold_switches_a_few_times_and_no_more(
    level: float, layout: str, seed: int
) -> None:
    """The level is a fraction of what ``4`` can do; 2+2 can do 1.43 times as much, 1+1+1+1 2.6 times."""
    noise, machine = random.Random(seed), make_machine()

    def hovering(now: float, current: Layout) -> Load:  # noqa: ARG001  the time is the simulation's
        rate = 29_700.0 * level * noise.uniform(0.8, 1.2)
        return make_load(str(current), {0: [short()]}, prompt_rate=rate)

    assert len(switches(hovering, machine, layout=layout)) <= 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [4.0, 12.0, 25.0, 50.0, 90.0])
def test_random_arrivals_switch_the_layout_now_and_then_at_most(rate: float, seed: int) -> None:
    """Requests of 200 to 1800 tokens; what waits is worked off at the speed of the layout."""
    draw, machine, estimator = random.Random(seed), make_machine(), LoadEstimator()
    capacity = {degree: Capacity(machine).prompt_speed[degree] for degree in (1, 2, 4)}
    state = {"next": 0.0, "backlog": 0.0}

    def arriving(now: float, current: Layout) -> Load:
        while state["next"] <= now:
            tokens = draw.randint(200, 1800)
            estimator.arrived(state["next"], tokens, 100)
            state["backlog"] += tokens
            state["next"] += draw.expovariate(rate)
        state["backlog"] = max(
            0.0, state["backlog"] - ASK_SECONDS * sum(capacity[degree] for degree in current.degrees)
        )
        waiting = [prompt(900)] * min(256, round(state["backlog"] / 900))
        prompt_rate, output_rate = estimator.rates(now)
        return make_load(str(current), {0: [short()]}, waiting, prompt_rate=prompt_rate, output_rate=output_rate)

    found = switches(arriving, machine)
    assert len(found) <= 4
    for (earlier, before), (later, after) in pairwise(found):
        if after.count("+") < before.count("+"):
            assert later - earlier >= MIN_DWELL


@pytest.mark.parametrize("num_devices", [4, 8])
def test_needs_that_come_and_go_under_overload_do_not_make_the_layout_flap(num_devices: int) -> None:
    def on_and_off(now: float, current: Layout) -> Load:
        urgent = [prompt(60, priority=-1)] if int(now / 0.1) % 2 else []
        return make_load(
            str(current), {0: [short()]}, urgent, num_devices=num_devices, prompt_rate=20_000.0 * num_devices
        )

    narrow = "+".join("1" * num_devices)
    found = switches(on_and_off, make_machine(num_devices), layout=narrow, seconds=20.0)
    assert len(found) <= 2 * 20.0 / MIN_DWELL + 1


# -- pure functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["1+1+1+1", "2+2", "4"])
def test_static_holds_whatever_happens(layout: str) -> None:
    load = make_load(layout, {0: [RequestLoad(ONE_DEVICE, 1, 10 * ONE_DEVICE)]}, [prompt(500)] * 256)
    decision = static(load, make_machine())
    assert (decision.target, decision.kind) == (None, DecisionKind.HOLD)


def test_policies_are_found_by_name() -> None:
    assert {"static": static, "load_adaptive": load_adaptive, "auto": load_adaptive} == POLICIES


def test_the_same_input_gives_the_same_decision_and_stays_as_it_was() -> None:
    load = make_load("1+1+1+1", crowd("1+1+1+1"), [prompt(60, priority=-1), prompt(1500)], prompt_rate=BUSY)
    machine = make_machine()
    before = copy.deepcopy((load, machine))
    decisions = [load_adaptive(load, machine) for _ in range(3)]
    assert decisions[0] == decisions[1] == decisions[2]
    assert (load, machine) == before


def partitions(num_devices: int, base_tp: int) -> list[Layout]:
    if num_devices == base_tp:
        return [Layout((base_tp,))]
    halves = partitions(num_devices // 2, base_tp)
    return [Layout((num_devices,)), *(Layout(left.degrees + right.degrees) for left in halves for right in halves)]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Load, Machine]:
    num_devices, base_tp = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 2)]))
    layouts = partitions(num_devices, base_tp)
    current = draw(st.sampled_from(layouts))
    some = draw(st.none() | st.lists(st.sampled_from(layouts), max_size=3))
    machine = make_machine(num_devices, base_tp, None if some is None else [str(each) for each in (current, *some)])

    def request(capacity: int) -> RequestLoad:
        tokens = draw(st.integers(1, capacity))
        limit = tokens + draw(st.sampled_from([0, 1, 50, 5 * ONE_DEVICE]))
        uncomputed = draw(st.sampled_from([0, 1, tokens]))
        width = draw(st.sampled_from([1, 1, 1, 1, 2, 4, 8]))
        return RequestLoad(tokens, min(tokens, uncomputed), limit, width, draw(st.sampled_from([0, 0, 0, -1, 1])))

    groups = tuple(
        GroupLoad(
            group,
            # A running request always has room for its next token.
            tuple(request(machine.kv.capacity_tokens(group.tp) - 1) for _ in range(draw(st.integers(0, 3)))),
            0,
        )
        for group in current.groups
    )
    widest = max(group.tp for group in machine.groups)
    waiting = tuple(request(machine.kv.capacity_tokens(widest)) for _ in range(draw(st.integers(0, 4))))
    rates = st.sampled_from([0.0, 1e3, 3e4, 1e5])
    last_switch = draw(st.sampled_from([None, 0.0, 9.99, 10.0]))
    return Load(10.0, current, groups, waiting, (), draw(rates), draw(rates), last_switch), machine


@pytest.mark.slow
@given(situations())
@settings(max_examples=400, deadline=None)
def test_every_decision_leads_to_a_layout_that_can_be_switched_to(situation: tuple[Load, Machine]) -> None:
    load, machine = situation
    decision = load_adaptive(load, machine)
    assert isinstance(decision, Decision)
    assert (decision.target is None) == (decision.kind is DecisionKind.HOLD)
    target = decision.target or load.layout
    assert Layout.parse(str(target), machine.num_devices, machine.base_tp) == target
    assert set(target.groups) <= machine.groups
    assert decision.target != load.layout
    for group in load.groups:
        for request in group.running:
            near = [each.tp for each in target.groups if each.overlaps(group.group)]
            assert machine.kv.capacity_tokens(max(near)) > request.tokens


@pytest.mark.slow
@given(situations())
@settings(max_examples=400, deadline=None)
def test_every_need_is_met_that_any_layout_could_meet(situation: tuple[Load, Machine]) -> None:
    load, machine = situation
    needs = needs_of(load, machine)
    target = load_adaptive(load, machine).target or load.layout
    possible = [
        each
        for each in partitions(machine.num_devices, machine.base_tp)
        if set(each.groups) <= machine.groups and needs.fit(each, machine)
    ]
    assert needs.unmet(target, machine) == min(needs.unmet(each, machine) for each in possible)
