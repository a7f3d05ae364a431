"""ShareGPT: conversations of people with a model, as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_jax.bench.phases import planned_arrivals, read_arrivals
from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.random_streams import Stream, generator
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.traces.rows import open_trace
from fly_jax.bench.workload_fields import Fields
from fly_jax.bench.workload_plan import Drafted, WorkloadPlan, fit, gather
from fly_jax.errors import ConfigError

# Usual for English text and vocabularies of 30,000 tokens or more.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a person wrote, and the answer."""

    prompt: str
    answer: str


def plan_sharegpt(fields: Fields, dataset: Path, limits: PlanLimits, seed: int) -> WorkloadPlan:
    """First exchanges of conversations in random order, each at most once, arriving in phases.

    Lengths need a tokenizer, so they are estimated: a text has ``len(text) // characters_per_token`` tokens, and at
    least one. A prompt that is too long by that estimate loses its end.

    Raises:
        ConfigError: a field is wrong, or the file is not of this format or has no exchange.
    """
    arrivals = read_arrivals(fields)
    per_token = fields.integer("characters_per_token", minimum=1, default=CHARACTERS_PER_TOKEN)
    input_scale = fields.number("input_scale", above=0, maximum=1, default=1.0)
    output_scale = fields.number("output_scale", above=0, default=1.0)
    fields.finish()
    conversations = _conversations(dataset)
    exchanges = [each for each in map(_first_exchange, conversations) if each is not None]
    if not exchanges:
        raise ConfigError(f"{dataset} has no conversation in which a gpt answers a human, of {len(conversations)}")
    order = generator(seed, Stream.ORDER).permutation(len(exchanges))
    drafted = []
    for arrival, index in zip(planned_arrivals(arrivals, seed, limits.num_prompts), order, strict=False):
        exchange = exchanges[index]
        prompt, output = len(exchange.prompt) // per_token, len(exchange.answer) // per_token
        asked = max(round(prompt * input_scale), 1)
        lengths = fit(asked, round(output * output_scale), limits.max_model_len)
        whole = lengths.prompt == asked and input_scale == 1
        text = exchange.prompt if whole else exchange.prompt[: lengths.prompt * per_token]
        request = PlannedRequest(arrival.at, text, lengths.prompt, lengths.output, tag=arrival.tag)
        drafted.append(Drafted(request, lengths.clipped))
    return gather(drafted, len(conversations) - len(exchanges), limits.max_model_len)


def _conversations(path: Path) -> list[dict[str, Any]]:
    with open_trace(path) as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise ConfigError(f"{path} must be a list of conversations, got {type(values).__name__}")
    for number, each in enumerate(values, 1):
        turns = each.get("conversations")
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise ConfigError(
                f'{path}, conversation {number}: "conversations" must be a list of {{"from": text, "value": text}}'
            )
    return values


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("from", "value"))


def _first_exchange(conversation: dict[str, Any]) -> Exchange | None:
    return next(_exchanges(conversation["conversations"]), None)


def _exchanges(turns: list[dict[str, str]]) -> Iterator[Exchange]:
    for asked, answered in itertools.pairwise(turns):
        if (asked["from"], answered["from"]) == ("human", "gpt") and asked["value"] and answered["value"]:
            yield Exchange(asked["value"], answered["value"])
