"""How much of each abuse there is, as options: the defaults are those of the reports that they come from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

from fly_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sizes:
    """One field an option; :data:`HELP` says what each is."""

    idle_seconds: float = 10.0
    after_seconds: float = 1.0
    settle_seconds: float = 5.0
    phase_seconds: float = 180.0
    large_prompts: int = 8
    large_bytes: int = 4_000_000
    largest_bytes: int = 15_800_000
    chat_messages: int = 200_000
    ids: int = 7_000_000
    held_connections: int = 100
    hold_seconds: float = 60.0
    connections: int = 4200
    connections_seconds: float = 17.0
    other_streams: int = 32
    wide_size: int = 0
    wide_rate: float = 4.0
    wide_seconds: float = 14.0
    wide_tokens: int = 4
    waiting_requests: int = 1400
    waiting_seconds: float = 10.0
    flood_requests: int = 256
    flood_seconds: float = 14.0


HELP = {
    "idle_seconds": "length of the phases without abuse",
    "after_seconds": "the others are watched for so long after a phase",
    "settle_seconds": "rest after a phase",
    "phase_seconds": "a phase that lasts longer is cut off",
    "large_prompts": "large texts at once",
    "large_bytes": "of each large text",
    "largest_bytes": "of the largest text, which should be just under the server's limit of a body",
    "chat_messages": "of the large chat",
    "ids": "in the large lists of token ids",
    "held_connections": "that are slow or idle",
    "hold_seconds": "longest that each of them is kept; longer than the server's timeouts",
    "connections": "in the phase that opens as many as the server can have files",
    "connections_seconds": "that they are kept",
    "other_streams": "well-behaved streams beside wide requests, enough for the policy to want narrow groups",
    "wide_size": "devices that a wide request asks for; 0: all",
    "wide_rate": "wide requests a second",
    "wide_seconds": "that they are sent",
    "wide_tokens": "that each generates",
    "waiting_requests": "of one client at once, more than the server runs and lets wait",
    "waiting_seconds": "that they are kept up",
    "flood_requests": "at once in the floods with and without priority",
    "flood_seconds": "that the floods last",
}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    for each in fields(Sizes):
        read: Callable[[str], float] = int if isinstance(each.default, int) else float
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=read,
            default=each.default,
            metavar="N",
            help=f"{HELP[each.name]} (default: %(default)s)",
        )


def sizes_of(options: argparse.Namespace) -> Sizes:
    """
    Raises:
        ConfigError: one is below 0, or a rate is not above it.
    """
    for each in fields(Sizes):
        value = getattr(options, each.name)
        if not value >= 0 or (each.name == "wide_rate" and value == 0):
            least = "above 0" if each.name == "wide_rate" else "at least 0"
            raise ConfigError(f"--{each.name.replace('_', '-')} must be {least}, got {value:g}")
    return Sizes(**{each.name: getattr(options, each.name) for each in fields(Sizes)})
