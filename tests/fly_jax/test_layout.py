from __future__ import annotations

import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_jax.errors import LayoutError
from fly_jax.layout import DeviceGroup, Layout, all_groups, max_tp_degree

BASE_TPS = (1, 2, 4, 8)


def partitions(start: int, size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Degrees of every way to halve ``size`` devices again and again."""
    whole = st.just((size,))
    if size == 1:
        return whole
    halves = st.tuples(st.deferred(lambda: partitions(start, size // 2)), partitions(start + size // 2, size // 2))
    return st.one_of(whole, halves.map(lambda pair: pair[0] + pair[1]))


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("1+1+1+1", (1, 1, 1, 1)),
        ("2+1+1", (2, 1, 1)),
        ("1+1+2", (1, 1, 2)),
        ("4", (4,)),
        ("dp4", (1, 1, 1, 1)),
        ("dp2", (2, 2)),
        ("dp1", (4,)),
        ("tp4", (4,)),
        ("tp2", (2, 2)),
        ("tp1", (1, 1, 1, 1)),
        ("dp2xtp2", (2, 2)),
        ("DP2xTP2", (2, 2)),
        ("  2 + 2\n", (2, 2)),
        ("\tdp4 ", (1, 1, 1, 1)),
        ("02+2", (2, 2)),
    ],
)
def test_text_and_aliases_are_read(text: str, degrees: tuple[int, ...]) -> None:
    assert Layout.parse(text, 4).degrees == degrees


@given(partitions(0, 8))
def test_canonical_text_is_read_back_as_the_same_layout(degrees: tuple[int, ...]) -> None:
    layout = Layout.parse("+".join(map(str, degrees)), 8)
    assert layout.degrees == degrees
    assert Layout.parse(str(layout), 8) == layout
    assert [index for group in layout.groups for index in group.device_indices] == list(range(8))
    assert layout.widest == max(degrees)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "+", "1+", "+4", "1++1", "2,2", "2x2", "four", "-4", "1.0", "0x4", "4 4", "1+dp3", "dp2+tp2",
        "x", "xtp4", "dp4x", "dpxtp", "dp", "tp", "tp2xdp2", "dp-1", "dp2xxtp2", "dp2tp2", "dp2xtp2xtp1", "4;",
        "\x00", "1e0",
        "4\n+", "\uff19", "dp\u0664", "tp²", "∞", "0", "0+4", "4+0", "dp0", "tp0", "dp0xtp0", "dp0xtp4", "dp4xtp0",
        "9" * 400, "dp" + "9" * 400, "1+" * 4000 + "1", "1+" * 500 + "1", "dp99999", "dp9999",
    ],
)  # fmt: skip
def test_malformed_text_is_a_layout_error_of_one_line(text: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text, 4)
    assert "\n" not in str(caught.value)
    assert "\x00" not in str(caught.value)
    assert len(str(caught.value)) < 250


@given(st.text(alphabet=string.digits + "dptxDPTX+- .\n²٤", max_size=14), st.integers(1, 9))
def test_any_text_either_partitions_the_devices_or_is_a_layout_error(text: str, num_devices: int) -> None:
    try:
        layout = Layout.parse(text, num_devices)
    except LayoutError:
        return
    assert layout.num_devices == num_devices
    assert all(g.num_devices & (g.num_devices - 1) == 0 and g.start % g.num_devices == 0 for g in layout.groups)


@pytest.mark.parametrize(("text", "uses"), [("2+1", 3), ("4+4", 8), ("dp8", 8), ("tp8", 8), ("dp3", 3), ("dp2xtp4", 8)])
def test_a_layout_of_another_number_of_devices_is_refused_with_both_numbers(text: str, uses: int) -> None:
    with pytest.raises(LayoutError, match=rf"uses {uses} devices but the engine has 4"):
        Layout.parse(text, 4)


@pytest.mark.parametrize(("text", "size", "start"), [("1+2+1", 2, 1), ("1+3", 3, 1), ("3+1", 3, 0)])
def test_groups_that_are_not_aligned_powers_of_two_are_refused(text: str, size: int, start: int) -> None:
    with pytest.raises(LayoutError, match=rf"group of {size} at device {start}"):
        Layout.parse(text, 4)


def test_degrees_below_the_base_tp_are_refused_with_both_numbers() -> None:
    assert Layout.parse("4+2+2", 8, base_tp=2).degrees == (4, 2, 2)
    assert Layout.parse("dp4", 8, base_tp=2).degrees == (2, 2, 2, 2)
    with pytest.raises(LayoutError, match=r"degree 1 is below the base TP 2"):
        Layout.parse("4+2+1+1", 8, base_tp=2)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("base_tp", BASE_TPS)
def test_every_rank_reads_inside_the_shard_that_its_device_holds(num_devices: int, base_tp: int) -> None:
    groups = all_groups(num_devices, base_tp)
    assert bool(groups) == (base_tp <= num_devices)
    for group in groups:
        order = group.rank_order(base_tp)
        assert sorted(order) == list(group.device_indices)
        for rank, device in enumerate(order):
            shard = device % base_tp
            wanted = Fraction(rank, group.tp), Fraction(rank + 1, group.tp)
            held = Fraction(shard, base_tp), Fraction(shard + 1, base_tp)
            assert held[0] <= wanted[0]
            assert wanted[1] <= held[1]


@pytest.mark.parametrize("base_tp", BASE_TPS)
def test_all_groups_are_those_that_some_layout_holds(base_tp: int) -> None:
    held = {DeviceGroup(start, size) for size in (1, 2, 4, 8) if size >= base_tp for start in range(0, 8, size)}
    groups = all_groups(8, base_tp)
    assert set(groups) == held
    assert len(groups) == len(held)
    assert [group.tp for group in groups] == sorted(group.tp for group in groups)


@given(st.sampled_from(all_groups(16, 1)), st.sampled_from(all_groups(16, 1)))
def test_groups_overlap_exactly_when_they_share_a_device(one: DeviceGroup, other: DeviceGroup) -> None:
    shared = set(one.device_indices) & set(other.device_indices)
    assert one.overlaps(other) == other.overlaps(one) == bool(shared)


def test_names_say_degree_and_devices() -> None:
    assert [str(group) for group in Layout.parse("2+1+1", 4).groups] == ["tp2@0-1", "tp1@2", "tp1@3"]


@pytest.mark.parametrize(("devices", "degree"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8)])
def test_widest_degree_is_the_largest_power_of_two(devices: int, degree: int) -> None:
    assert max_tp_degree(devices) == degree
