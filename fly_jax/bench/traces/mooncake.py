"""Mooncake: JSON lines with the hash of each block of 512 tokens of a prompt, so that shared prefixes are known.

https://github.com/kvcache-ai/Mooncake (FAST'25)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fly_jax.bench.prompts import BLOCK_TOKENS
from fly_jax.bench.traces.rows import TraceRow, open_trace, seconds, token_count
from fly_jax.errors import ConfigError

_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


def mooncake_rows(path: Path) -> Iterator[TraceRow]:
    """The rows of ``timestamp`` (milliseconds), ``input_length``, ``output_length`` and ``hash_ids``.

    Raises:
        ConfigError: the file is not of this format, or a prompt has not as many hash ids as blocks.
    """
    with open_trace(path) as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield _row(path, line, text)


def _row(path: Path, line: int, text: str) -> TraceRow:
    values = _values(path, line, text)
    at = seconds(path, line, "timestamp", values["timestamp"]) / 1000
    prompt, output = (token_count(path, line, name, values[name]) for name in ("input_length", "output_length"))
    hash_ids = values["hash_ids"]
    if not isinstance(hash_ids, list) or not all(type(each) is int and each >= 0 for each in hash_ids):
        raise ConfigError(f"{path}, line {line}: hash_ids must be a list of integers from 0, got {hash_ids!r}")
    blocks = -(-prompt // BLOCK_TOKENS)
    if len(hash_ids) != blocks:
        raise ConfigError(
            f"{path}, line {line}: an input_length of {prompt} is {blocks} blocks of {BLOCK_TOKENS} tokens, "
            f"got {len(hash_ids)} hash_ids"
        )
    return TraceRow(line, at, prompt, output, hash_ids=tuple(hash_ids))


def _values(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {line} is not JSON: {error}") from error
    missing = [key for key in _KEYS if key not in values] if isinstance(values, dict) else list(_KEYS)
    if missing:
        raise ConfigError(f"{path}, line {line} has no {', '.join(missing)}; it must have {', '.join(_KEYS)}")
    return dict(values)
