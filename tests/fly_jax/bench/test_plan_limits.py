"""Limits of plans."""

from __future__ import annotations

from typing import Any

import pytest

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 1}, "max_model_len must be at least 2, .* got 1"),
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"vocab_size": 10}, "vocab_size must be above 10, .* got 10"),
    ],
)
def test_limits_that_leave_no_room_for_a_request_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"max_model_len": 2, "num_prompts": 1, "vocab_size": 11}
    PlanLimits(**good)
    with pytest.raises(ConfigError, match=message):
        PlanLimits(**{**good, **change})
