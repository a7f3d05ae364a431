from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_jax.config import EngineConfig
from fly_jax.errors import ConfigError

INTEGERS = (
    "devices", "base_tp", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
    "max_queued_per_client", "block_size", "num_blocks", "device_memory_bytes", "optimization_level", "seed",
)  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 4.0, "4"])
def test_what_is_no_integer_is_refused_by_name_booleans_too(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be an integer, got {value!r}"):
        EngineConfig(Path("model"), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", True),
        ("gpu_memory_utilization", "0.5"),
        ("engine_timeout", True),
        ("engine_timeout", "60"),
        ("overlap", 1),
        ("allow_request_width", 0),
    ],
)
def test_what_is_no_number_or_flag_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value!r}"):
        EngineConfig(Path("model"), **{name: value})


def test_integers_of_numpy_are_integers() -> None:
    assert EngineConfig(Path("model"), seed=np.int64(3)).seed == 3


@pytest.mark.parametrize(
    ("waiting", "of_one", "share"), [(1024, None, 512), (1, None, 1), (3, None, 2), (8, 5, 5), (8, 20, 8)]
)
def test_one_client_may_have_half_of_the_waiting_places_unless_told_otherwise(
    waiting: int, of_one: int | None, share: int
) -> None:
    config = EngineConfig(Path("model"), max_num_queued_reqs=waiting, max_queued_per_client=of_one)
    assert config.queued_per_client == share


def test_a_share_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_queued_per_client must be at least 1, got 0"):
        EngineConfig(Path("model"), max_queued_per_client=0)
