"""Names that callers give while the engine runs, checked where they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fly_jax.config import POLICIES, one_of
from fly_jax.outputs import SwitchStrategy

if TYPE_CHECKING:
    from fly_jax.policy.adaptive import Policy

AUTO, LOAD_ADAPTIVE, STATIC = "auto", "load_adaptive", "static"


def canonical(name: str) -> str:
    """The name that a policy goes by once it is in force."""
    return LOAD_ADAPTIVE if name == AUTO else name


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


def policy_given(policy: str | Policy) -> str | Policy:
    """A layout policy's name, or a function that is one, as it was given.

    Raises:
        ConfigError: there is no policy of that name; the message lists those there are.
    """
    return policy if callable(policy) else policy_named(policy)
