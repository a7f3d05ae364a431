from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from fly_jax.bench import kernel_timing
from fly_jax.bench.__main__ import main, parse
from fly_jax.bench.attention_work import LAYERS, Heads, Work, random_pool
from fly_jax.bench.kernel_results import Row, verdicts
from fly_jax.bench.kernel_tuning import best_row
from kernels_pallas.tuning import TABLE
from kernels_pallas.xla import XLABackend

HEADS = Heads(kv_heads=4, group=2, head_dim=64)


def test_bytes_and_flops_are_those_of_the_definition() -> None:
    decode = Work(HEADS, tp=2, block_size=16, batch=3, context=100, queries=1)
    assert decode.bytes_read == 3 * 100 * 2 * (4 // 2) * 64 * 2
    assert decode.flops == 3 * 100 * (4 // 2) * 2 * 4 * 64
    prompt = replace(decode, batch=1, context=5, queries=3)
    assert prompt.flops == (3 + 4 + 5) * (4 // 2) * 2 * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize(("context", "queries"), [(100, 1), (40, 40), (100, 21)])
def test_the_work_that_is_timed_is_that_of_every_request(context: int, queries: int) -> None:
    """Its runs name each request's last positions, and its tables all blocks of the pool, each once."""
    work = Work(HEADS, tp=2, block_size=16, batch=3, context=context, queries=queries)
    runs = work.runs()
    used = np.asarray(runs.tables)[:, : work.blocks_each]
    assert sorted(used.ravel()) == list(range(work.num_blocks))
    positions: dict[int, list[int]] = {row: [] for row in range(3)}
    for row, start, length in zip(*(np.asarray(each) for each in (runs.rows, runs.starts, runs.lengths)), strict=True):
        positions[int(row)] += range(start, start + length)
    assert all(mine == list(range(context - queries, context)) for mine in positions.values())
    query = work.query(jax.random.key(0))
    assert query.shape[0] == len(runs.rows)
    pool = random_pool(work.num_blocks, work.spec, work.dtype)
    result = XLABackend().paged_attention(query, pool, LAYERS - 1, runs, work.layout(), work.options)
    assert np.isfinite(np.asarray(result, np.float32)).all()


@pytest.mark.slow
def test_the_command_says_that_there_is_no_gpu_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    arguments = "kernels --contexts 40 --batches 1 2 --degrees 1 2 --kv-heads 2 --group 2 --head-dim 16 --save-result"
    assert main([*arguments.split(), "--result-dir", str(tmp_path)]) == 0
    assert "No GPU here, so the kernels are not timed" in capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {"date", "jax", "device_kind", "copy_bytes_per_second", "matmul_flops_per_second"} <= result.keys()
    measured = {(row["kind"], row["tp"], row["batch"], row["queries"]) for row in result["rows"]}
    decodes = {("decode", tp, batch, 1) for tp in (1, 2) for batch in (1, 2)}
    assert measured == decodes | {("prefill", tp, 1, 40) for tp in (1, 2)}
    for row in result["rows"]:
        assert row["backend"] == "xla"
        assert row["us"] > 0
        assert row["jax_us"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--degrees", "3"], "--kv-heads 8 cannot be divided among TP 3: leave it out"),
        (["--contexts", "0"], "--contexts must be at least 1, got 0"),
        (["--tune", "--backend", "xla"], "--tune times kernels"),
        (["--head-dim", "0"], "--head-dim must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_place_that_cannot_hold_results_is_refused_before_anything_is_measured(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: object) -> None:
        pytest.fail("the device was measured")

    monkeypatch.setattr(kernel_timing, "Bench", measured)
    (tmp_path / "file").touch()
    place = tmp_path / "file" / below
    assert main(["kernels", "--save-result", "--result-dir", str(place)]) == 2
    error = capsys.readouterr().err
    assert f"{place} cannot be a folder: name another place" in error
    assert error.count("\n") == 1


def row(kind: str, *, share: float, us: float = 1.0, torch_us: float | None = None, context: int = 8192) -> Row:
    return Row(kind, 1, 64, context, 1, "pallas", us, 1.0, share, None, None, torch_us)


def test_verdicts_count_what_reaches_its_target() -> None:
    rows = [
        row("decode", share=0.9, torch_us=2.0),
        row("decode", share=0.8, torch_us=0.5),
        row("decode", share=0.1, context=512),  # too few tokens in all to count
        row("prefill", share=0.61),
        row("prefill", share=0.2, context=512),
    ]
    lines = verdicts(rows)
    assert lines[0].endswith("rate: 1 of 2")
    assert lines[1].endswith("rate: 1 of 1")
    assert lines[2].endswith("SDPA: 1 of 2")


def test_work_comes_in_the_order_in_which_it_was_asked_for() -> None:
    """Where time runs out, what was named first has been measured."""
    arguments = "kernels --contexts 64 32 --batches 2 1 --degrees 2 1 --kv-heads 2 --group 1 --head-dim 16"
    work, left_out = kernel_timing.Bench(parse(arguments.split())).work()
    assert not left_out
    assert [(each.context, each.batch, each.tp, each.queries) for each in work] == [
        (context, batch, tp, new)
        for context in (64, 32)
        for batch, new in ((2, 1), (1, 1), (1, context))
        for tp in (2, 1)
    ]


def test_the_line_for_the_table_is_best_over_all_work() -> None:
    (entry,) = (each for each in TABLE if each.head_dim == 128)
    decode, prefill = entry.decode, entry.prefill
    other, unsayable = replace(decode, num_warps=4), replace(decode, num_stages=7)
    long, crowded = Work(HEADS, 1, 16, 1, 32_768, 1), Work(HEADS, 1, 16, 64, 2048, 1)
    prompt = Work(HEADS, 1, 16, 1, 8192, 8192)
    timed = {
        long: {decode: 1.0, other: 1.1, unsayable: 0.9},
        crowded: {decode: 2.0, other: 1.0, unsayable: 1.0},
        prompt: {prefill: 3.0},
    }
    line = best_row(128, "NVIDIA H200", timed)
    assert line.startswith("_hopper(128, (64, 4, 3), (128, 64, 8, 1), ")
    assert "11% and 0% slower than the best of each work on NVIDIA H200" in line
    assert best_row(128, "NVIDIA H200", {long: {unsayable: 1.0}, prompt: {prefill: 1.0}}).startswith("no line")
