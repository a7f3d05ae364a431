"""Estimates the load from requests as they arrive and end. Pure Python, no JAX, no clock of its own."""

from __future__ import annotations

import math

# An arrival's weight falls to 1/e in this many seconds: long enough to average some tens of requests at the rates at
# which layouts differ, short enough that a burst is forgotten within a few dwells.
TIME_CONSTANT = 3.0
# Beside it, a short-lived weight sees a burst that begins; it counts where it shows so many times the average, which
# ten random arrivals a time constant do not reach by chance.
BURST_TIME_CONSTANT = 0.5
BURST_FACTOR = 2.0
# The first arrivals are not spread over less than this, so that one request alone is no burst.
SHORTEST_WINDOW = 1.0
# Output tokens expected of a request before any has ended: of chats, a common length.
FIRST_GUESS = 128
# Ended requests of which the mean output is taken: it follows a change of traffic within as many.
MEAN_OVER = 32


class LoadEstimator:
    """Rates of prompt tokens and of the output tokens that come with them."""

    def __init__(self) -> None:
        self._average = _DecayingRates(TIME_CONSTANT)
        self._burst = _DecayingRates(BURST_TIME_CONSTANT)
        self._mean_output = 0.0
        self._ended = 0

    def arrived(self, now: float, prompt_tokens: int, limit_output: int) -> None:
        """A request came in.

        Args:
            now: seconds on any clock.
            limit_output: most output tokens that it may have.
        """
        output_tokens = min(limit_output, self.expected_output)
        for rates in (self._average, self._burst):
            rates.add(now, prompt_tokens, output_tokens)

    def finished(self, output_tokens: int) -> None:
        """A request ended after this many output tokens."""
        self._ended = min(MEAN_OVER, self._ended + 1)
        self._mean_output += (output_tokens - self._mean_output) / self._ended

    @property
    def expected_output(self) -> float:
        """Output tokens of a request without a limit."""
        return self._mean_output if self._ended else FIRST_GUESS

    def rates(self, now: float) -> tuple[float, float]:
        """Prompt tokens and expected output tokens a second."""
        # The arrivals of a burst are counted from the second one on: one alone says nothing about a rate.
        count = self._burst.arrivals(now)
        trust = max(0.0, 1 - 1 / count) if count else 0.0
        prompts, outputs = zip(self._average.at(now), self._burst.at(now), strict=True)
        return _burst_or_average(trust, *prompts), _burst_or_average(trust, *outputs)


class _DecayingRates:
    """Each arrival counts with a weight that decays exponentially.

    The sum is divided by the weights that a steady stream since the first arrival would have, so that a young
    estimate is not too low.
    """

    def __init__(self, time_constant: float) -> None:
        self._time_constant = time_constant
        self._first: float | None = None
        self._latest = 0.0
        self._arrivals = 0.0
        self._prompt_tokens = 0.0
        self._output_tokens = 0.0

    def add(self, now: float, prompt_tokens: float, output_tokens: float) -> None:
        if self._first is None:
            self._first = self._latest = now
        decay = self._decay(now)
        self._arrivals = decay * self._arrivals + 1
        self._prompt_tokens = decay * self._prompt_tokens + prompt_tokens
        self._output_tokens = decay * self._output_tokens + output_tokens
        self._latest = max(now, self._latest)

    def at(self, now: float) -> tuple[float, float]:
        """Tokens a second."""
        if self._first is None:
            return 0.0, 0.0
        elapsed = max(now - self._first, self._latest - self._first, SHORTEST_WINDOW)
        window = -self._time_constant * math.expm1(-elapsed / self._time_constant)
        scale = self._decay(now) / window
        return scale * self._prompt_tokens, scale * self._output_tokens

    def arrivals(self, now: float) -> float:
        """Requests that still count."""
        return self._decay(now) * self._arrivals

    def _decay(self, now: float) -> float:
        return math.exp(min(0.0, self._latest - now) / self._time_constant)


def _burst_or_average(trust: float, average: float, burst: float) -> float:
    return trust * burst if trust * burst > BURST_FACTOR * average else average
