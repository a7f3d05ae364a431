"""Azure LLM inference traces of 2023 and 2024: CSV with the time and the lengths of every request.

https://github.com/Azure/AzurePublicDataset (AzureLLMInferenceDataset2023.md, AzureLLMInferenceDataset2024.md)
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fly_jax.bench.traces.rows import TraceRow, csv_rows, token_count
from fly_jax.errors import ConfigError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def azure_rows(path: Path) -> Iterator[TraceRow]:
    """The rows of ``TIMESTAMP,ContextTokens,GeneratedTokens``; times without a time zone are taken as UTC.

    Raises:
        ConfigError: the file is not of this format.
    """
    for line, row in csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        at = _seconds(path, line, row["TIMESTAMP"])
        prompt, output = (token_count(path, line, name, row[name]) for name in ("ContextTokens", "GeneratedTokens"))
        yield TraceRow(line, at, prompt, output)


def _seconds(path: Path, line: int, text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{path}, line {line}: TIMESTAMP must be a date and time, got {text!r}") from error
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH).total_seconds()
