"""Prompts of random content and of uniformly distributed lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fly_jax.bench.plan_limits import FIRST_RANDOM_ID
from fly_jax.bench.prompts import RandomPrompts
from fly_jax.bench.random_streams import Stream, generator
from fly_jax.bench.requests import PlannedRequest
from fly_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RandomLengths:
    """Uniform ranges of lengths in tokens, as ``--random-range-ratio`` of ``vllm bench serve`` defines them.

    Attributes:
        input_len, output_len: the middles of the ranges.
        range_ratio: lengths go from ``1 - range_ratio`` to ``1 + range_ratio`` times the middle, both included.

    Raises:
        ConfigError: a length below 1, or a ratio outside of [0, 1).
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("input", self.input_len), ("output", self.output_len)):
            if value < 1:
                raise ConfigError(f"--random-{name}-len must be at least 1, got {value}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"--random-range-ratio must be in [0, 1), got {self.range_ratio:g}")

    @property
    def longest(self) -> int:
        """Most tokens of a request, prompt and output."""
        return sum(_range(middle, self.range_ratio)[1] for middle in (self.input_len, self.output_len))

    @classmethod
    def fitting(cls, limit: int, input_len: int, output_len: int, range_ratio: float) -> RandomLengths:
        """With as many prompt tokens, ``input_len`` or fewer, as leave the longest request within the limit.

        Where not even one does, there is one.
        """
        rest = limit - _range(output_len, range_ratio)[1]
        inputs = max(1, min(input_len, math.floor(rest / (1 + range_ratio))))
        # Rounding of the product may have lengthened the range by one.
        while inputs > 1 and _range(inputs, range_ratio)[1] > rest:
            inputs -= 1
        return cls(inputs, output_len, range_ratio)

    def draw(self, random: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
        """Lengths of ``count`` prompts and outputs."""
        inputs, outputs = (
            random.integers(*_range(middle, self.range_ratio), size=count, endpoint=True).tolist()
            for middle in (self.input_len, self.output_len)
        )
        return inputs, outputs


def _range(middle: int, ratio: float) -> tuple[int, int]:
    return max(1, math.floor(middle * (1 - ratio))), math.ceil(middle * (1 + ratio))


def random_requests(
    times: Sequence[float], lengths: RandomLengths, vocab_size: int, seed: int, *, as_text: bool = False
) -> list[PlannedRequest]:
    """One request for each time.

    Args:
        vocab_size: token ids are drawn from ``[FIRST_RANDOM_ID, vocab_size)``.
        as_text: prompts of as many common words, for endpoints that take no token ids; the server's usage then says
            how many tokens they have.

    Raises:
        ConfigError: the vocabulary leaves no token id to draw.
    """
    if vocab_size <= FIRST_RANDOM_ID:
        raise ConfigError(f"--vocab-size must be above {FIRST_RANDOM_ID}, got {vocab_size}")
    inputs, outputs = lengths.draw(generator(seed, Stream.LENGTHS), len(times))
    prompts = RandomPrompts(seed, vocab_size, as_text=as_text)
    return [
        PlannedRequest(
            at=at,
            prompt=prompts.prompt(number, prompt_tokens),
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        for number, (at, prompt_tokens, max_tokens) in enumerate(zip(times, inputs, outputs, strict=True))
    ]
