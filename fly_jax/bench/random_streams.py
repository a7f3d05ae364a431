"""Independent random streams of one seed, so that drawing more of one thing leaves the others as they are."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fly_jax.errors import ConfigError


class Stream(IntEnum):
    """What is drawn. The numbers are part of what a seed means."""

    GAPS = 0
    RATES = 1
    LENGTHS = 2
    PROMPT = 3
    SHARED_BLOCK = 4
    ORDER = 5


def generator(seed: int, stream: Stream, number: int = 0) -> np.random.Generator:
    """The random numbers of one stream, or of thing ``number`` of it.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"the seed must be at least 0, got {seed}")
    return np.random.default_rng((seed, int(stream), number))
