"""The sizes of what is sent are those asked for."""

from __future__ import annotations

import json

import pytest

from fly_jax.bench.abuse_parts.large_inputs import _with_ids, text


@pytest.mark.parametrize("size", [1, 100, 12_345])
def test_a_text_has_the_bytes_asked_for_and_is_the_same_each_time(size: int) -> None:
    assert len(text(size).encode()) == size
    assert text(size) == text(size)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 1000])
def test_a_list_has_the_ids_asked_for(count: int) -> None:
    body = json.loads(_with_ids(b'{"model":"m","tokens":[]}', count))
    assert body["model"] == "m"
    assert len(body["tokens"]) == count
    assert set(body["tokens"]) <= set(range(1, 10))
