from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_jax.config import EngineConfig
from fly_jax.errors import ConfigError

INTEGERS = (
    "devices", "base_tp", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
    "block_size", "num_blocks", "device_memory_bytes", "optimization_level", "seed",
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
    ],
)
def test_what_is_no_number_or_flag_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value!r}"):
        EngineConfig(Path("model"), **{name: value})


def test_integers_of_numpy_are_integers() -> None:
    assert EngineConfig(Path("model"), seed=np.int64(3)).seed == 3
