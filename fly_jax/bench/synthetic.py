"""Workloads that are made up: random prompts of given lengths at given rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fly_jax.bench.phases import planned_arrivals, read_arrivals
from fly_jax.bench.plan_limits import UNKNOWN_LEN, PlanLimits
from fly_jax.bench.prompts import RandomPrompts
from fly_jax.bench.random_streams import Stream, generator
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.workload_fields import Fields
from fly_jax.bench.workload_plan import Drafted, WorkloadPlan, fit, gather


@dataclass(frozen=True)
class RequestKind:
    """One kind of request of a mix.

    Attributes:
        share: of all requests.
        input_tokens: ``(smallest, largest)``, uniform; None: by ``input_fraction``.
        input_fraction: the same, as fractions of ``max_model_len``.
        output_tokens: ``(smallest, largest)``, uniform.
        priority, tensor_parallel_size, tag: of its requests.
    """

    share: float
    input_tokens: tuple[int, int] | None
    input_fraction: tuple[float, float] | None
    output_tokens: tuple[int, int]
    priority: int
    tensor_parallel_size: int | None
    tag: str

    def draw(self, random: np.random.Generator, max_model_len: int) -> tuple[int, int]:
        """Tokens of a prompt and of its output."""
        if self.input_tokens is not None:
            prompt = int(random.integers(*self.input_tokens, endpoint=True))
        else:
            assert self.input_fraction is not None
            prompt = round(random.uniform(*self.input_fraction) * max_model_len)
        return prompt, int(random.integers(*self.output_tokens, endpoint=True))


def read_mix(fields: Fields) -> tuple[RequestKind, ...]:
    """The tables ``[[mix]]``.

    Raises:
        ConfigError: a field is wrong, or the shares do not add up to 1.
    """
    tables = fields.tables("mix")
    mix = tuple(_read_kind(each, only=len(tables) == 1) for each in tables)
    total = sum(kind.share for kind in mix)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise fields.error(f"the shares of [[mix]] must add up to 1, got {total:g}")
    return mix


def _read_kind(fields: Fields, *, only: bool) -> RequestKind:
    if fields.has("input_tokens") == fields.has("input_fraction"):
        got = "both" if fields.has("input_tokens") else "neither"
        raise fields.error(f"give one of input_tokens and input_fraction, got {got}")
    tokens, fraction = None, None
    if fields.has("input_tokens"):
        tokens = fields.integers_range("input_tokens", minimum=1)
    else:
        fraction = fields.numbers_range("input_fraction", minimum=0, maximum=1)
    hinted = fields.has("tensor_parallel_size")
    kind = RequestKind(
        share=fields.number("share", above=0, maximum=1, default=1.0 if only else None),
        input_tokens=tokens,
        input_fraction=fraction,
        output_tokens=fields.integers_range("output_tokens", minimum=1),
        priority=fields.integer("priority", default=0),
        tensor_parallel_size=fields.integer("tensor_parallel_size", minimum=1) if hinted else None,
        tag=fields.text("tag", ""),
    )
    fields.finish()
    return kind


def plan_synthetic(fields: Fields, limits: PlanLimits, seed: int) -> WorkloadPlan:
    """Requests of a mix that arrive in phases; the tag of a request is ``phase/kind``, or the one there is."""
    arrivals, mix = read_arrivals(fields), read_mix(fields)
    fields.finish()
    if limits.max_model_len == UNKNOWN_LEN and any(kind.input_fraction is not None for kind in mix):
        raise fields.error("input_fraction is of the model's context, and the server does not say it: --max-model-len")
    prompts = RandomPrompts(seed, limits.vocab_size, as_text=limits.as_text)
    shares = np.cumsum([kind.share for kind in mix])
    drafted = []
    for number, arrival in enumerate(planned_arrivals(arrivals, seed, limits.num_prompts)):
        random = generator(seed, Stream.LENGTHS, number)
        kind = mix[min(int(np.searchsorted(shares, random.random(), side="right")), len(mix) - 1)]
        lengths = fit(*kind.draw(random, limits.max_model_len), limits.max_model_len)
        request = PlannedRequest(
            at=arrival.at,
            prompt=prompts.prompt(number, lengths.prompt),
            prompt_tokens=lengths.prompt,
            max_tokens=lengths.output,
            priority=kind.priority,
            tensor_parallel_size=kind.tensor_parallel_size,
            tag="/".join(each for each in (arrival.tag, kind.tag) if each),
        )
        drafted.append(Drafted(request, lengths.clipped))
    return gather(drafted, 0, limits.max_model_len)
