"""Finding and planning workloads, and those that are shipped."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.workload_files import known_workloads, workloads_folder
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.bench.workloads import kind_of, plan
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.workload_builders import (
    LIMITS,
    RANDOM,
    plan_text,
    write_azure,
    write_burstgpt,
    write_mooncake,
    write_sharegpt,
)

LARGE = PlanLimits(max_model_len=8192, num_prompts=None, vocab_size=32_000)
MADE_UP = ("random", "burst", "burst-demo", "ramp", "priority", "long_context")
TRACES = ("azure", "burstgpt", "mooncake", "sharegpt")


def _dataset(folder: Path, name: str) -> Path:
    if name == "azure":
        return write_azure(folder, [("18:00:00", 40, 5), ("18:00:01", 50, 6)])
    if name == "burstgpt":
        return write_burstgpt(folder, [(5, 40, 5), (65, 50, 6)])
    if name == "mooncake":
        return write_mooncake(folder, [(0, 40, 5, [0]), (1000, 600, 6, [0, 1])])
    return write_sharegpt(folder, [[("human", "a question"), ("gpt", "an answer")]] * 2)


def _shipped(name: str, limits: PlanLimits, seed: int = 0) -> WorkloadPlan:
    return plan(name, dataset_path=None, limits=limits, seed=seed)


def test_every_shipped_workload_is_tested_here_and_described() -> None:
    assert known_workloads() == sorted((*MADE_UP, *TRACES))
    readme = (workloads_folder() / "README.md").read_text()
    for name in known_workloads():
        assert f"`{name}`" in readme
        assert (workloads_folder() / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_UP)
def test_shipped_workloads_that_are_made_up_can_be_planned(name: str) -> None:
    planned = _shipped(name, LARGE)
    times = [each.at for each in planned.requests]
    assert times == sorted(times)
    assert planned.clipped == planned.skipped == 0


@pytest.mark.parametrize("name", TRACES)
def test_shipped_traces_can_be_planned_from_a_small_file(name: str, tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, name)
    planned = plan(name, dataset_path=dataset, limits=LIMITS, seed=0)
    assert len(planned.requests) == 2
    assert planned.clipped == planned.skipped == 0
    assert planned == plan(name, dataset_path=dataset, limits=LIMITS, seed=0)


@pytest.mark.parametrize("name", [name for name in MADE_UP if name != "burst"])
def test_all_made_up_workloads_but_the_papers_fit_the_bundled_model(name: str) -> None:
    assert _shipped(name, LIMITS).clipped == 0


@pytest.mark.slow
def test_the_papers_workload_is_what_the_paper_says() -> None:
    requests = _shipped("burst", LARGE).requests
    assert len(requests) == 4000
    assert (min(each.prompt_tokens for each in requests), max(each.prompt_tokens for each in requests)) == (
        pytest.approx(128, abs=20),
        pytest.approx(4000, abs=20),
    )
    assert {each.max_tokens for each in requests} <= set(range(64, 513))
    assert (requests[0].tag, requests[-1].at > 60) == ("low", True)
    # Whole phases of 30 s; five standard deviations of a Poisson count beyond the range of rates.
    counts = Counter((int(each.at // 30), each.tag) for each in requests)
    for (number, tag), count in counts.items():
        if number < requests[-1].at // 30:
            assert tag == ("low", "high")[number % 2]
            low, high = {"low": (60, 150), "high": (300, 900)}[tag]
            assert low - 5 * low**0.5 < count < high + 5 * high**0.5


def test_the_demo_of_it_lasts_a_minute_with_short_requests() -> None:
    for seed in range(5):
        planned = _shipped("burst-demo", LIMITS, seed)
        assert 55 < planned.seconds < 80
        assert all(16 <= each.prompt_tokens <= 200 and 16 <= each.max_tokens <= 64 for each in planned.requests)
        assert {each.tag for each in planned.requests} == {"low", "high"}


def test_the_ramp_goes_up_and_down_again() -> None:
    counts = Counter(int(each.at // 20) for each in _shipped("ramp", LIMITS).requests)
    assert counts[0] < counts[1] < counts[2]
    assert counts[3] > counts[4] > counts[5]


def test_a_fifth_of_the_priority_workload_goes_first_and_half_of_that_asks_for_width() -> None:
    requests = _shipped("priority", LIMITS).requests
    urgent = [each for each in requests if each.priority == -1]
    wide = [each for each in urgent if each.tensor_parallel_size == 2]
    # Five standard deviations of a binomial count of 300.
    assert len(urgent) == pytest.approx(60, abs=35)
    assert len(wide) == pytest.approx(30, abs=26)
    assert all(each.tensor_parallel_size is None for each in requests if each.priority == 0)


def test_the_long_contexts_are_near_the_limit_and_few() -> None:
    requests = _shipped("long_context", LARGE).requests
    long = [each for each in requests if each.tag == "long"]
    assert 0 < len(long) < 30
    assert all(0.75 * 8192 <= each.prompt_tokens <= 0.9 * 8192 for each in long)
    assert all(each.prompt_tokens <= 256 for each in requests if each.tag == "short")


def test_a_plan_is_of_as_many_requests_as_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RANDOM)
    whole = plan_text(tmp_path, RANDOM).requests
    for number in (3, 30):
        requests = plan(str(path), dataset_path=None, limits=replace(LIMITS, num_prompts=number), seed=0).requests
        assert len(requests) == number
        assert requests[:20] == whole[:number]


def test_the_kind_of_a_workload_is_known_without_planning_it(tmp_path: Path) -> None:
    assert kind_of("burst", None) == "random"
    assert kind_of("sharegpt", write_sharegpt(tmp_path, [])) == "sharegpt"
    with pytest.raises(ConfigError, match="cannot read the dataset"):
        kind_of("azure", tmp_path)


def test_prompts_of_words_share_blocks_as_those_of_ids_do(tmp_path: Path) -> None:
    dataset = write_mooncake(tmp_path, [(0, 600, 5, [0, 1]), (1000, 700, 6, [0, 2])])
    limits = replace(LIMITS, as_text=True)
    first, second = (each.prompt for each in plan("mooncake", dataset_path=dataset, limits=limits, seed=0).requests)
    assert isinstance(first, str)
    assert isinstance(second, str)
    words = [text.split(" ") for text in (first, second)]
    assert [len(each) for each in words] == [600, 700]
    assert words[0][:512] == words[1][:512]
    assert words[0][512:] != words[1][512:600]


@pytest.mark.parametrize("name", ["bursts", "no/such/file", "no_such.toml", "", ".", "burst/"])
def test_an_unknown_workload_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no workload '{re.escape(name)}': .*azure, burst, burst-demo, burstgpt"):
        plan(name, dataset_path=None, limits=LIMITS, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kind is missing; it must be a string"),
        ("kind = 3", "kind must be a string, got 3"),
        ('kind = "poisson"', "kind must be one of random, sharegpt, azure, burstgpt, mooncake, got 'poisson'"),
        ('kind = "random', "is not TOML: "),
        ("kind = " + "9" * 5000, "is not TOML: "),
        (RANDOM.replace("rate = 4", "rate = 1e308"), "rate in [[phases]] number 1 must be a number of at least 0 and"),
        ('kind = "azure"', "is of the azure format: give a file of it with --dataset-path"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        plan_text(tmp_path, text)
    assert str(tmp_path / "workload.toml") in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RANDOM.replace("rate = 4", "rate = HUGE"),
            "rate in [[phases]] number 1 must be a number of at least 0 and at most 1e+09, got",
        ),
        (RANDOM.replace("rate = 4", "rate_range = [1, HUGE]"), "got [1, an integer of more than 64 bits]"),
        (RANDOM.replace("[8, 16]", "[8, HUGE]"), "got [8, an integer of more than 64 bits]"),
        (RANDOM.replace("requests = 20", "requests = HUGE"), "requests must be an integer of at least 1, got"),
        (
            f"burstiness = -HUGE\n{RANDOM}",
            "burstiness must be a number of at least 0.01, got an integer of more than 64 bits",
        ),
        (f"mine = HUGE\n{RANDOM}", "unknown key mine (= an integer of more than 64 bits)"),
        ('kind = "random"\nseconds = HUGE', "got an integer of more than 64 bits"),
    ],
)
@pytest.mark.parametrize("huge", [str(2**63), "9" * 400])
def test_an_integer_that_no_float_or_array_holds_is_refused_in_a_line(
    tmp_path: Path, text: str, message: str, huge: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        plan_text(tmp_path, text.replace("HUGE", huge))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_dataset_that_nothing_would_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"random.toml makes its requests up and takes no --dataset-path, got .*x.csv"
    ):
        plan("random", dataset_path=tmp_path / "x.csv", limits=LIMITS, seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="the seed must be at least 0, got -1"):
        plan("random", dataset_path=None, limits=LIMITS, seed=-1)
