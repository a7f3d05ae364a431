"""When requests of a synthetic workload are sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fly_jax.bench.random_streams import Stream, generator
from fly_jax.config import one_of
from fly_jax.errors import ConfigError

RAMP_UP_STRATEGIES = ("linear", "exponential")


@dataclass(frozen=True, slots=True)
class RampUp:
    """A request rate that changes from the first request to the last.

    Attributes:
        strategy: ``linear``: by the same amount a request; ``exponential``: by the same factor.
        start_rps, end_rps: requests a second at the first and at the last request.

    Raises:
        ConfigError: an unknown strategy, or a rate that is not a positive number.
    """

    strategy: str
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        one_of("--ramp-up-strategy", self.strategy, RAMP_UP_STRATEGIES)
        for name, rate in (("start", self.start_rps), ("end", self.end_rps)):
            if not 0 < rate < math.inf:
                raise ConfigError(f"--ramp-up-{name}-rps must be a positive number, got {rate:g}")

    def rate_at(self, progress: float) -> float:
        """Requests a second; ``progress`` is 0 at the first request and 1 at the last."""
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return self.start_rps * (self.end_rps / self.start_rps) ** progress


def arrival_times(
    count: int, request_rate: float, burstiness: float, seed: int, ramp_up: RampUp | None = None
) -> tuple[float, ...]:
    """Seconds from the start of the run, ascending, one for each request.

    Gaps follow a gamma distribution of shape ``burstiness`` and scale ``1 / (rate * burstiness)``: 1 is a Poisson
    process, less comes in bursts, more is more even. As in ``vllm bench serve``, gaps are scaled so that the last
    request comes at ``count / request_rate``: a short run would otherwise offer another load than was asked for. With
    a ramp each gap has its own rate and nothing is scaled.

    Args:
        request_rate: requests a second; infinite: all at once. A ramp takes its place.

    Raises:
        ConfigError: a rate or a burstiness that is not positive.
    """
    if not request_rate > 0:
        raise ConfigError(f"--request-rate must be positive or inf, got {request_rate:g}")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness must be a positive number, got {burstiness:g}")
    if ramp_up is None and math.isinf(request_rate):
        return (0.0,) * count
    gaps = generator(seed, Stream.GAPS).gamma(burstiness, 1 / burstiness, count)
    if ramp_up is not None:
        gaps /= [ramp_up.rate_at(index / max(1, count - 1)) for index in range(count)]
    elif count and gaps.sum() > 0:
        gaps *= count / request_rate / gaps.sum()
    return tuple(np.cumsum(gaps).tolist())
