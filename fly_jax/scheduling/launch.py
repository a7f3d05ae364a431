"""Launches: steps as plain data, which can be logged, timed by a simulator or sent to another process. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fly_jax.kv.slabs import HeadSplits
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.step import StepPlan


class StepKind(StrEnum):
    DECODE = "decode"
    MIXED = "mixed"
    HEAD = "head"
    SCORE = "score"
    RELAYOUT = "relayout"


@dataclass(frozen=True, slots=True)
class ExecutableKey:
    """What a program is compiled for: the group, the kind of step and the bucket (rows or token places).

    Attributes:
        splits: the degrees between which a relayout moves KV; its bucket is slabs between two devices.
    """

    group: DeviceGroup
    kind: StepKind
    bucket: int
    splits: HeadSplits | None = None

    def __str__(self) -> str:
        if self.splits is not None:
            return f"{self.kind}[{self.splits}] on {self.group}"
        return f"{self.kind}[{self.bucket}] on {self.group}"


@dataclass(frozen=True, slots=True)
class Work:
    """How much a step computes: what its time is a function of, besides the group's degree.

    Attributes:
        rows: requests that decode, one token each.
        prompt_tokens: tokens in chunks of prompts, also of those that are computed again.
        context_tokens: positions that all requests of the step attend to, those it computes included.
        samples: requests that get a token: the rows, and chunks that end their prompts.
    """

    rows: int
    prompt_tokens: int
    context_tokens: int
    samples: int

    @classmethod
    def of(cls, plan: StepPlan) -> Work:
        return cls(
            rows=len(plan.decodes),
            prompt_tokens=sum(row.count for row in plan.prefills),
            context_tokens=sum(row.start + row.count for row in plan.rows),
            samples=len(plan.sampled),
        )

    @property
    def tokens(self) -> int:
        """That go through the layers."""
        return self.rows + self.prompt_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One step of one group, ready to be executed. It knows no request.

    Attributes:
        key: of the program through the layers: the group, the kind of step and its bucket.
        arrays: the upload of every program of the step in the order of their calls, int32 ``[ranks, size]`` or, where
            every rank gets the same, ``[1, size]``. A runner that computes nothing needs none.
        alternatives: alternatives of prompt tokens are wanted on the host.
    """

    key: ExecutableKey
    arrays: Mapping[ExecutableKey, np.ndarray]
    work: Work
    alternatives: bool = False
