"""What an engine's configuration lets requests ask for: told by any thread, without asking the engine."""

from __future__ import annotations

from fly_jax.config import EngineConfig
from fly_jax.errors import InvalidRequestError
from fly_jax.sampling_params import SamplingParams


def check_allowed(params: SamplingParams, config: EngineConfig) -> None:
    """
    Raises:
        InvalidRequestError: a priority where requests run in order of arrival, or a width where none may be asked for.
    """
    if params.priority and config.scheduling_policy != "priority":
        raise InvalidRequestError(
            f"priority {params.priority} needs --scheduling-policy priority, and this engine runs requests in "
            "order of arrival (fcfs): leave priority out",
            param="priority",
        )
    width = params.tensor_parallel_size or 1
    if width > 1 and not config.allow_request_width:
        raise InvalidRequestError(
            f"tensor_parallel_size {width} is refused, for this engine runs with --no-allow-request-width: "
            "leave it out",
            param="tensor_parallel_size",
        )
