"""What requests may ask for: told by any thread, without asking the engine."""

from __future__ import annotations

import operator
from collections.abc import Sequence

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


def checked_tokens(prompt_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """A prompt's tokens as integers of Python.

    Raises:
        InvalidRequestError: one is no integer, or outside the vocabulary.
    """
    try:
        tokens = tuple(operator.index(token) for token in prompt_ids)
    except TypeError as error:
        raise InvalidRequestError(f"token ids must be integers: {error}", param="prompt") from None
    if bool in set(map(type, prompt_ids)):
        raise InvalidRequestError("token ids must be integers: got a boolean", param="prompt")
    if wrong := [token for token in tokens if not 0 <= token < vocab_size]:
        raise InvalidRequestError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}", param="prompt")
    return tokens
