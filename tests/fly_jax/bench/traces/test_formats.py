"""Rows of the trace formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fly_jax.bench.traces.azure import azure_rows
from fly_jax.bench.traces.burstgpt import burstgpt_rows
from fly_jax.bench.traces.mooncake import mooncake_rows
from fly_jax.bench.traces.rows import TraceRow
from fly_jax.errors import ConfigError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
Reader = Callable[[Path], Iterator[TraceRow]]


def _rows(folder: Path, reader: Reader, text: str) -> list[TraceRow]:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return list(reader(path))


def test_azure_2023_has_times_without_a_zone_and_seven_digits(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:03.9799600,4808,10\r\n\r\n2023-11-16 18:17:04.0319600,3180,8"
    first, second = _rows(tmp_path, azure_rows, text)
    assert (first.line, first.input_tokens, first.output_tokens) == (2, 4808, 10)
    assert (second.line, second.input_tokens, second.output_tokens) == (4, 3180, 8)
    assert second.at - first.at == pytest.approx(0.052, abs=1e-6)


def test_azure_2024_has_times_with_a_zone(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01+02:00,2399,6\n"
    first, second = _rows(tmp_path, azure_rows, text)
    assert (first.input_tokens, second.output_tokens) == (2162, 6)
    assert second.at - first.at == pytest.approx(0.99007, abs=1e-6)


def test_burstgpt_goes_by_the_names_of_its_columns(tmp_path: Path) -> None:
    plain = _rows(tmp_path, burstgpt_rows, BURSTGPT + "5,ChatGPT,472,18,490,API log\n")
    other = "\ufeffTimestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    assert plain == _rows(tmp_path, burstgpt_rows, other + "5,s-1,2.5,ChatGPT,472,18,490,API log\n")
    assert plain == [TraceRow(2, 5.0, 472, 18, "API log")]


def test_mooncake_counts_milliseconds_and_names_its_blocks(tmp_path: Path) -> None:
    line = '{"timestamp": 1500, "input_length": 513, "output_length": 7, "hash_ids": [0, 46]}\n'
    assert _rows(tmp_path, mooncake_rows, line + "\n") == [TraceRow(1, 1.5, 513, 7, hash_ids=(0, 46))]


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (azure_rows, "", "has no column TIMESTAMP, ContextTokens, GeneratedTokens; it must have TIMESTAMP, "),
        (azure_rows, BURSTGPT, "has no column TIMESTAMP, ContextTokens, GeneratedTokens; it must have"),
        (azure_rows, AZURE + "yesterday,1,2\n", "line 2: TIMESTAMP must be a date and time, got 'yesterday'"),
        (azure_rows, AZURE + "2023-11-16 18:17:03,many,2\n", "line 2: ContextTokens must be a number, got 'many'"),
        (azure_rows, AZURE + "2023-11-16 18:17:03,3\n", "line 2: GeneratedTokens must be a number, got ''"),
        (azure_rows, AZURE + "2023-11-16 18:17:03,-3,1\n", "ContextTokens must be a number of tokens, got '-3'"),
        (azure_rows, AZURE + "2023-11-16 18:17:03,1.5,1\n", "ContextTokens must be a number of tokens, got '1.5'"),
        (azure_rows, AZURE + f'"{"x" * 200_000}",1,1\n', "is not CSV: field larger than field limit"),
        (burstgpt_rows, AZURE, "has no column Timestamp, Request tokens, Response tokens, Log Type; it must have"),
        (burstgpt_rows, BURSTGPT + "nan,GPT-4,1,2,3,API log\n", "line 2: Timestamp must be a number, got 'nan'"),
        (mooncake_rows, "{\n", "line 1 is not JSON: "),
        (mooncake_rows, "[1]\n", "line 1 has no timestamp, input_length, output_length, hash_ids; it must have"),
        (mooncake_rows, '{"timestamp": 0}\n', "line 1 has no input_length, output_length, hash_ids; it must have"),
        (
            mooncake_rows,
            '{"timestamp": null, "input_length": 5, "output_length": 7, "hash_ids": [0]}',
            "line 1: timestamp must be a number, got None",
        ),
        (
            mooncake_rows,
            '{"timestamp": 0, "input_length": true, "output_length": 7, "hash_ids": [0]}',
            "line 1: input_length must be a number, got True",
        ),
        (
            mooncake_rows,
            '{"timestamp": 0, "input_length": 5, "output_length": 7, "hash_ids": ["a"]}',
            "line 1: hash_ids must be a list of integers from 0, got ['a']",
        ),
        (
            mooncake_rows,
            '{"timestamp": 0, "input_length": 513, "output_length": 7, "hash_ids": [0]}',
            "line 1: an input_length of 513 is 2 blocks of 512 tokens, got 1 hash_ids",
        ),
    ],
)
def test_what_is_not_of_the_format_is_refused_with_its_line(
    tmp_path: Path, reader: Reader, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        _rows(tmp_path, reader, text)
    assert str(tmp_path / "trace") in str(refused.value)


@pytest.mark.parametrize("reader", [azure_rows, burstgpt_rows, mooncake_rows])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, reader: Reader) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the dataset .*none.csv: No such file"):
        list(reader(tmp_path / "none.csv"))


@pytest.mark.parametrize("reader", [azure_rows, burstgpt_rows, mooncake_rows])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(ConfigError, match="binary"):
        list(reader(path))
