"""Which layout fits a load. Pure Python, no JAX.

A policy of one's own is a function of a :class:`Load` and a :class:`Machine` that returns a :class:`Decision`.
"""

from fly_jax.policy.adaptive import Decision, DecisionKind, Policy, load_adaptive
from fly_jax.policy.observation import GroupLoad, Load, Machine, RequestLoad, StepTimes

__all__ = [
    "Decision",
    "DecisionKind",
    "GroupLoad",
    "Load",
    "Machine",
    "Policy",
    "RequestLoad",
    "StepTimes",
    "load_adaptive",
]
