"""BurstGPT: CSV of requests to ChatGPT and GPT-4 over months, with bursts and failures.

https://github.com/HPMLL/BurstGPT (arXiv 2401.17644)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fly_jax.bench.traces.rows import TraceRow, csv_rows, seconds, token_count


def burstgpt_rows(path: Path) -> Iterator[TraceRow]:
    """The rows of ``Timestamp`` (seconds), ``Request tokens``, ``Response tokens``, tagged by their ``Log Type``.

    Requests that failed have no response tokens. Other columns, which differ between releases, are not read.

    Raises:
        ConfigError: the file is not of this format.
    """
    for line, row in csv_rows(path, ("Timestamp", "Request tokens", "Response tokens", "Log Type")):
        at = seconds(path, line, "Timestamp", row["Timestamp"])
        prompt, output = (token_count(path, line, name, row[name]) for name in ("Request tokens", "Response tokens"))
        yield TraceRow(line, at, prompt, output, row["Log Type"])
