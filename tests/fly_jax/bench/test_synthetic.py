"""Workloads that are made up."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fly_jax.errors import ConfigError
from tests.fly_jax.bench.workload_builders import LIMITS, ONE_KIND, ONE_PHASE, RANDOM, plan_text

MIX = """
[[mix]]
tag = "ordinary"
share = 0.7
input_tokens = [8, 16]
output_tokens = [4, 9]
[[mix]]
tag = "urgent"
share = 0.3
input_tokens = [20, 20]
output_tokens = [2, 2]
priority = -1
tensor_parallel_size = 2
"""


def test_lengths_take_every_value_of_their_ranges_and_no_other(tmp_path: Path) -> None:
    text = RANDOM.replace("requests = 20", "requests = 500").replace("[4, 4]", "[1, 6]")
    requests = plan_text(tmp_path, text).requests
    assert {each.prompt_tokens for each in requests} == set(range(8, 17))
    assert {each.max_tokens for each in requests} == set(range(1, 7))
    for each in requests:
        assert len(each.prompt) == each.prompt_tokens
        assert (each.priority, each.tensor_parallel_size, each.tag) == (0, None, "")


def test_a_mix_has_its_shares_and_each_kind_its_own_fields(tmp_path: Path) -> None:
    phase = '[[phases]]\ntag = "low"\nrate = 4\n'
    requests = plan_text(tmp_path, f'kind = "random"\nrequests = 2000\n{phase}{MIX}').requests
    fields = Counter((each.tag, each.priority, each.tensor_parallel_size) for each in requests)
    assert set(fields) == {("low/ordinary", 0, None), ("low/urgent", -1, 2)}
    spread = math.sqrt(2000 * 0.3 * 0.7)
    assert fields["low/urgent", -1, 2] == pytest.approx(600, abs=5 * spread)
    assert all(each.prompt_tokens == 20 for each in requests if each.priority == -1)


def test_seeds_repeat_and_differ(tmp_path: Path) -> None:
    first, again, other = (plan_text(tmp_path, RANDOM, seed=seed).requests for seed in (1, 1, 2))
    assert first == again
    assert first[0].prompt != other[0].prompt
    assert first[0].at != other[0].at


def test_a_request_does_not_depend_on_how_many_others_there_are(tmp_path: Path) -> None:
    every = plan_text(tmp_path, RANDOM).requests
    assert plan_text(tmp_path, RANDOM, limits=replace(LIMITS, num_prompts=7)).requests == every[:7]
    assert plan_text(tmp_path, RANDOM.replace("requests = 20", "requests = 9")).requests == every[:9]


def test_lengths_and_tokens_do_not_depend_on_the_rate(tmp_path: Path) -> None:
    slow, fast = (plan_text(tmp_path, RANDOM.replace("rate = 4", f"rate = {rate}")).requests for rate in (1, 50))
    assert [each.prompt for each in slow] == [each.prompt for each in fast]
    assert slow[-1].at == pytest.approx(50 * fast[-1].at)


def test_fractions_follow_the_context_limit(tmp_path: Path) -> None:
    text = RANDOM.replace("input_tokens = [8, 16]", "input_fraction = [0.5, 0.75]")
    for limit in (64, 4096):
        requests = plan_text(tmp_path, text, limits=replace(LIMITS, max_model_len=limit)).requests
        assert all(limit / 2 <= each.prompt_tokens <= limit * 3 / 4 for each in requests)
        assert len({each.prompt_tokens for each in requests}) > 5


def test_requests_that_do_not_fit_are_clipped_and_counted(tmp_path: Path) -> None:
    planned = plan_text(tmp_path, RANDOM, limits=replace(LIMITS, max_model_len=12))
    clipped = [each for each in planned.requests if each.prompt_tokens + each.max_tokens == 12]
    assert len(planned.requests) == 20
    assert all(each.prompt_tokens == len(each.prompt) == 8 for each in planned.requests)
    whole = plan_text(tmp_path, RANDOM).requests
    assert planned.clipped == sum(each.prompt_tokens > 8 for each in whole) > 10
    assert len(clipped) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'kind = "random"\n{ONE_PHASE}{ONE_KIND}', "requests or seconds is missing"),
        (RANDOM.replace("= 20", '= "20"'), "requests must be an integer of at least 1, got '20'"),
        (RANDOM.replace("= 20", "= true"), "requests must be an integer of at least 1, got True"),
        (RANDOM.replace("= 20", "= 0"), "requests must be an integer of at least 1, got 0"),
        ("seconds = -1\n" + RANDOM, "seconds must be a number above 0, got -1"),
        ("seconds = inf\n" + RANDOM, "seconds must be a number above 0, got inf"),
        ("burstiness = 0\n" + RANDOM, "burstiness must be a number of at least 0.01, got 0"),
        ("rate_scale = 2\n" + RANDOM, "unknown key rate_scale (= 2); known ones are burstiness, kind, mix, phases, "),
        (
            RANDOM.replace("rate = 4", 'rate = "4"'),
            "rate in [[phases]] number 1 must be a number of at least 0 and at most 1e+09, got '4'",
        ),
        (
            RANDOM.replace("rate = 4", "rate = -4"),
            "rate in [[phases]] number 1 must be a number of at least 0 and at most 1e+09, got -4",
        ),
        (RANDOM.replace("rate = 4", "rate = 0"), "no phase has a rate above 0"),
        (
            RANDOM.replace("rate = 4", "seconds = 4"),
            "give one of rate and rate_range, got neither in [[phases]] number 1",
        ),
        (RANDOM.replace("rate = 4", "rate = 4\nrate_range = [1, 2]"), "give one of rate and rate_range, got both"),
        (RANDOM.replace("rate = 4", "rate_range = [3, 2]"), "two numbers of at least 0 and at most 1e+09, got [3, 2]"),
        (RANDOM.replace("rate = 4", "rate_range = [3]"), "two numbers of at least 0 and at most 1e+09, got [3]"),
        (
            RANDOM.replace("rate = 4", "rate = 4\nend_rate = -1"),
            "end_rate in [[phases]] number 1 must be a number of at",
        ),
        (RANDOM.replace("rate = 4", "rate = 4\nend_rate = 1"), "seconds in [[phases]] number 1 is missing"),
        (
            RANDOM.replace("rate = 4", "rate = 4\nrates = 1"),
            "unknown key rates in [[phases]] number 1 (= 1); known ones",
        ),
        (RANDOM.replace("rate = 4", "rate = 4\ntag = 1"), "tag in [[phases]] number 1 must be a string, got 1"),
        (RANDOM + ONE_PHASE, "seconds in [[phases]] number 1 is missing; it must be a number above 0"),
        (f'kind = "random"\nrequests = 2\n{ONE_KIND}', "phases is missing; it must be one or more tables [[phases]]"),
        (f'kind = "random"\nrequests = 2\n{ONE_PHASE}', "mix is missing; it must be one or more tables [[mix]]"),
        (f'kind = "random"\nrequests = 2\nmix = []\n{ONE_PHASE}', "mix must be one or more tables [[mix]], got []"),
        (f'kind = "random"\nrequests = 2\nmix = 3\n{ONE_PHASE}', "mix must be one or more tables [[mix]], got 3"),
        (RANDOM.replace("[8, 16]", "[0, 16]"), "input_tokens in [[mix]] number 1 must be [smallest, largest], two"),
        (RANDOM.replace("[8, 16]", "[8, 7]"), "two integers of at least 1, got [8, 7]"),
        (RANDOM.replace("[8, 16]", "8"), "two integers of at least 1, got 8"),
        (RANDOM.replace("[8, 16]", "[8.0, 16]"), "two integers of at least 1, got [8.0, 16]"),
        (RANDOM.replace("[4, 4]", "[4, 0]"), "output_tokens in [[mix]] number 1 must be"),
        (RANDOM.replace("input_tokens = [8, 16]", ""), "give one of input_tokens and input_fraction, got neither"),
        (RANDOM + "input_fraction = [0.1, 0.2]\n", "give one of input_tokens and input_fraction, got both"),
        (RANDOM.replace("input_tokens = [8, 16]", "input_fraction = [0.5, 1.5]"), "at most 1, got [0.5, 1.5]"),
        (RANDOM + "share = 0\n", "share in [[mix]] number 1 must be a number above 0 and at most 1, got 0"),
        (RANDOM + "share = 0.5\n", "the shares of [[mix]] must add up to 1, got 0.5"),
        (RANDOM + ONE_KIND, "share in [[mix]] number 1 is missing"),
        (RANDOM + "priority = 0.5\n", "priority in [[mix]] number 1 must be an integer, got 0.5"),
        (RANDOM + "tensor_parallel_size = 0\n", "tensor_parallel_size in [[mix]] number 1 must be an integer of at"),
        (RANDOM + "temperature = 0\n", "unknown key temperature in [[mix]] number 1 (= 0)"),
        (RANDOM.replace("requests = 20", "seconds = 1e-9"), "no request arrives before the workload ends"),
    ],
)
def test_a_wrong_field_is_refused_with_its_file_its_name_and_both_values(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_text(tmp_path, text)
    assert str(tmp_path / "workload.toml") in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
