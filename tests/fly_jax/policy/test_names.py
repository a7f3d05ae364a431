from __future__ import annotations

from typing import Any

import pytest

from fly_jax.errors import ConfigError
from fly_jax.outputs import SwitchStrategy
from fly_jax.policy.adaptive import load_adaptive
from fly_jax.policy.names import policy_given, policy_named, strategy_named


def test_every_strategy_has_its_name_and_none_is_the_engines_own() -> None:
    names = ("migrate", "sequential", "soft_preempt", "hard_preempt")
    assert tuple(strategy_named(name) for name in names) == tuple(SwitchStrategy)
    assert strategy_named(SwitchStrategy.HARD_PREEMPT) is SwitchStrategy.HARD_PREEMPT
    assert strategy_named(None) is None


@pytest.mark.parametrize("name", ["", "Migrate", "drain", 0, ["migrate"]])
def test_another_strategy_is_refused_with_the_choices(name: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        strategy_named(name)
    expected = f"strategy must be one of migrate, sequential, soft_preempt, hard_preempt, got {name!r}"
    assert str(refused.value) == expected


@pytest.mark.parametrize("name", ["auto", "load_adaptive", "static"])
def test_policies_keep_their_names(name: str) -> None:
    assert policy_named(name) == name


@pytest.mark.parametrize("name", ["", "Auto", "pinned", None, 3])
def test_another_policy_is_refused_with_the_choices(name: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        policy_named(name)
    assert str(refused.value) == f"policy must be one of auto, load_adaptive, static, got {name!r}"


def test_a_policy_may_be_given_as_a_function_and_names_are_checked_as_ever() -> None:
    assert policy_given(load_adaptive) is load_adaptive
    assert policy_given("auto") == "auto"
    with pytest.raises(ConfigError, match=r"^policy must be one of auto, load_adaptive, static, got 'pinned'$"):
        policy_given("pinned")
