"""Writing result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fly_jax.bench import results
from fly_jax.errors import ConfigError

RESULT = {
    "ttfts": [0.1, 2.5e-05, -3, 4.0],
    "nested": {"itls": [[0.5, 0.25], [], [1.0]], "none": []},
    "texts": ["[1,\n 2]", "a"],
    "rows": [{"seconds": 1.5, "runs": [1, 2]}],
}


def test_lists_of_numbers_are_a_line_each_and_everything_reads_back_as_it_was(tmp_path: Path) -> None:
    path = results.save(tmp_path / "new", "run", RESULT, of_devices=False)
    text = path.read_text()
    found = json.loads(text)
    assert {key: found[key] for key in RESULT} == RESULT
    assert {"date", "fly_jax", "jax", "python", "host"} <= found.keys()
    lines = [line.strip() for line in text.splitlines()]
    assert '"ttfts": [ 0.1, 2.5e-05, -3, 4.0 ],' in lines
    assert '"runs": [ 1, 2 ]' in lines
    assert "[ 0.5, 0.25 ]," in lines


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ConfigError, match=r"run\.json: Is a directory"):
        results.save(tmp_path, "run", RESULT, of_devices=False)
