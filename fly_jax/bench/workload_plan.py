"""A planned workload, and what had to be cut for it."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.bench.requests import PlannedRequest


@dataclass(frozen=True)
class Lengths:
    """Tokens of a request.

    Attributes:
        clipped: whether either is less than the workload asked for.
    """

    prompt: int
    output: int
    clipped: bool


def fit(prompt: int, output: int, max_model_len: int) -> Lengths:
    """Lengths that a model can hold, each at least 1.

    The output keeps up to half of the context and the prompt what is left, so that neither vanishes.
    """
    prompt, output = max(prompt, 1), max(output, 1)
    fitting_output = min(output, max(max_model_len - prompt, max_model_len // 2))
    fitting_prompt = min(prompt, max_model_len - fitting_output)
    return Lengths(fitting_prompt, fitting_output, (fitting_prompt, fitting_output) != (prompt, output))


@dataclass(frozen=True)
class Drafted:
    """A request that a workload has made up.

    Attributes:
        clipped: whether its lengths were cut to fit the model.
    """

    request: PlannedRequest
    clipped: bool


@dataclass(frozen=True)
class WorkloadPlan:
    """What a workload sends, and what became of the rest of it.

    Attributes:
        requests: by ``at``.
        clipped: how many of them were cut to ``max_model_len`` tokens.
        skipped: entries of a trace that are no request that can be sent: no prompt or no output.
    """

    requests: tuple[PlannedRequest, ...]
    max_model_len: int
    clipped: int = 0
    skipped: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(each.prompt_tokens for each in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(each.max_tokens for each in self.requests)

    @property
    def seconds(self) -> float:
        """When the last request is to be sent."""
        return self.requests[-1].at

    def summary(self) -> str:
        """One line for people: how much there is, and how many requests were clipped or skipped."""
        return (
            f"{len(self.requests)} requests over {self.seconds:.1f} s, {self.prompt_tokens} prompt tokens, "
            f"{self.output_tokens} output tokens; {self.clipped} clipped to {self.max_model_len} tokens, "
            f"{self.skipped} entries without a prompt or an output skipped"
        )


def gather(drafted: list[Drafted], skipped: int, max_model_len: int) -> WorkloadPlan:
    """The plan of these requests, in the order in which they are to be sent."""
    requests = sorted((each.request for each in drafted), key=lambda request: request.at)
    return WorkloadPlan(tuple(requests), max_model_len, sum(each.clipped for each in drafted), skipped)
