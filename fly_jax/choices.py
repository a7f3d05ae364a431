"""Names that callers give while the engine runs, checked where they are given."""

from __future__ import annotations

from fly_jax.config import POLICIES, one_of
from fly_jax.outputs import SwitchStrategy


def strategy_named(name: str | None) -> SwitchStrategy | None:
    """A switch strategy; None, for the engine's default, stays None.

    Raises:
        ConfigError: there is no such strategy; the message lists those there are.
    """
    return None if name is None else SwitchStrategy(one_of("strategy", name, tuple(SwitchStrategy)))


def policy_named(name: str) -> str:
    """A layout policy's name, as it was given.

    Raises:
        ConfigError: there is no such policy; the message lists those there are.
    """
    return one_of("policy", name, POLICIES)
