"""Replays of traces: windows, scales, clipping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fly_jax.bench.prompts import RandomPrompts
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.workload_builders import LIMITS, plan_text, write_azure, write_burstgpt, write_mooncake

ROWS = [(100.0 + 10 * number, 20 + number, 5 + number) for number in range(6)]


def _replay(folder: Path, options: str, num_prompts: int | None = None, seed: int = 0) -> WorkloadPlan:
    dataset = write_burstgpt(folder, ROWS)
    limits = replace(LIMITS, num_prompts=num_prompts)
    return plan_text(folder, f'kind = "burstgpt"\n{options}', dataset=dataset, limits=limits, seed=seed)


def _times_and_lengths(planned: WorkloadPlan) -> list[tuple[float, int, int]]:
    return [(each.at, each.prompt_tokens, each.max_tokens) for each in planned.requests]


def test_without_options_a_trace_is_replayed_as_it_was(tmp_path: Path) -> None:
    planned = _replay(tmp_path, "")
    assert _times_and_lengths(planned) == [(at - 100, prompt, output) for at, prompt, output in ROWS]
    assert all(len(each.prompt) == each.prompt_tokens for each in planned.requests)
    assert planned.requests[0] == PlannedRequest(
        0.0, RandomPrompts(0, 1472).prompt(2, 20), 20, 5, tag="Conversation log"
    )


def test_a_window_begins_at_zero_and_has_the_same_prompts(tmp_path: Path) -> None:
    whole = _replay(tmp_path, "").requests
    window = _replay(tmp_path, "window_start = 15\nwindow_seconds = 25\n").requests
    assert [each.at for each in window] == [5, 15]
    assert [each.prompt for each in window] == [each.prompt for each in whole[2:4]]


def test_a_window_has_its_first_moment_and_not_its_last(tmp_path: Path) -> None:
    window = _replay(tmp_path, "window_start = 10\nwindow_seconds = 20\n").requests
    assert [(each.at, each.prompt_tokens) for each in window] == [(0, 21), (10, 22)]


def test_a_rate_scale_makes_a_trace_faster_but_its_window_stays(tmp_path: Path) -> None:
    planned = _replay(tmp_path, "rate_scale = 4\nwindow_seconds = 40\n")
    assert [each.at for each in planned.requests] == [0, 2.5, 5, 7.5]


def test_lengths_are_scaled_to_at_least_one_token(tmp_path: Path) -> None:
    planned = _replay(tmp_path, "input_scale = 0.5\noutput_scale = 0.01\n")
    assert _times_and_lengths(planned)[:2] == [(0, 10, 1), (10, 10, 1)]
    assert _times_and_lengths(_replay(tmp_path, "output_scale = 3"))[0] == (0, 20, 15)
    assert planned.clipped == 0


def test_at_most_so_many_requests_are_the_first(tmp_path: Path) -> None:
    assert _replay(tmp_path, "", num_prompts=2).requests == _replay(tmp_path, "").requests[:2]


def test_seeds_change_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    first, other = _replay(tmp_path, "", seed=1), _replay(tmp_path, "", seed=2)
    assert _times_and_lengths(first) == _times_and_lengths(other)
    assert first.requests[0].prompt != other.requests[0].prompt


def test_requests_that_do_not_fit_are_clipped_and_counted(tmp_path: Path) -> None:
    rows = [("10:00:00", 900, 100), ("10:00:01", 1000, 100), ("10:00:02", 9000, 2000), ("10:00:03", 924, 100)]
    planned = plan_text(tmp_path, 'kind = "azure"', dataset=write_azure(tmp_path, rows))
    assert [each[1:] for each in _times_and_lengths(planned)] == [(900, 100), (924, 100), (512, 512), (924, 100)]
    assert planned.clipped == 2
    assert "4 requests over 3.0 s" in planned.summary()
    assert "2 clipped to 1024 tokens" in planned.summary()


def test_requests_that_failed_are_skipped_and_counted(tmp_path: Path) -> None:
    dataset = write_burstgpt(tmp_path, [(0, 0, 0), (1, 10, 0), (2, 10, 3)])
    planned = plan_text(tmp_path, 'kind = "burstgpt"', dataset=dataset)
    assert _times_and_lengths(planned) == [(2, 10, 3)]
    assert planned.skipped == 2


def test_shared_hash_blocks_are_shared_prefixes_at_every_scale(tmp_path: Path) -> None:
    rows = [(0, 1400, 5, [0, 1, 2]), (10, 1500, 5, [0, 1, 3]), (20, 700, 5, [4, 5])]
    dataset = write_mooncake(tmp_path, rows)
    limits = replace(LIMITS, max_model_len=4096)
    for scale, shared, lengths in ((1.0, 1024, [1400, 1500, 700]), (0.25, 256, [350, 375, 175])):
        text = f'kind = "mooncake"\ninput_scale = {scale}\n'
        requests = plan_text(tmp_path, text, dataset=dataset, limits=limits).requests
        assert [each.prompt_tokens for each in requests] == [len(each.prompt) for each in requests] == lengths
        first, second, third = (each.prompt for each in requests)
        assert first[:shared] == second[:shared]
        assert first[shared : shared + 20] != second[shared : shared + 20]
        assert first[:20] != third[:20]


def test_clipped_prompts_keep_their_shared_prefix(tmp_path: Path) -> None:
    dataset = write_mooncake(tmp_path, [(0, 1400, 24, [0, 1, 2]), (10, 520, 24, [0, 1])])
    long, short = plan_text(tmp_path, 'kind = "mooncake"', dataset=dataset).requests
    assert (long.prompt_tokens, short.prompt_tokens) == (1000, 520)
    assert long.prompt[:520] == short.prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rate_scale = 0", "rate_scale must be a number above 0, got 0"),
        ('rate_scale = "2"', "rate_scale must be a number above 0, got '2'"),
        ("window_start = -1", "window_start must be a number of at least 0, got -1"),
        ("window_seconds = 0", "window_seconds must be a number above 0, got 0"),
        ("window_seconds = nan", "window_seconds must be a number above 0, got nan"),
        ("input_scale = [1, 2]", "input_scale must be a number above 0, got [1, 2]"),
        ("output_scale = true", "output_scale must be a number above 0, got True"),
        ("requests = 5", "unknown key requests (= 5); known ones are input_scale, kind, output_scale, rate_scale, "),
        ("window_start = 51", "has no request with a prompt and an output in the inf s from second 51 on"),
    ],
)
def test_a_wrong_option_is_refused_with_its_file_its_name_and_both_values(
    tmp_path: Path, options: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _replay(tmp_path, options)
    assert str(tmp_path / "workload.toml") in str(refused.value)
    assert message in str(refused.value)


def test_a_trace_that_is_not_in_the_order_of_time_is_refused(tmp_path: Path) -> None:
    dataset = write_burstgpt(tmp_path, [(1, 10, 3), (5, 10, 3), (4, 10, 3)])
    with pytest.raises(ConfigError, match=r"line 4: a request at 4.000 s comes after one at 5.000 s; sort the file"):
        plan_text(tmp_path, 'kind = "burstgpt"', dataset=dataset)


def test_reading_stops_where_the_window_ends(tmp_path: Path) -> None:
    dataset = write_burstgpt(tmp_path, [(1, 10, 3), (5, 10, 3)])
    dataset.write_text(dataset.read_text() + "not,a,row\n")
    assert len(plan_text(tmp_path, 'kind = "burstgpt"\nwindow_seconds = 4', dataset=dataset).requests) == 1
