"""Workloads: which requests a benchmark sends, and when. ``bench/workloads/README.md`` describes the files."""

from __future__ import annotations

from pathlib import Path

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.synthetic import plan_synthetic
from fly_jax.bench.traces.azure import azure_rows
from fly_jax.bench.traces.burstgpt import burstgpt_rows
from fly_jax.bench.traces.mooncake import mooncake_rows
from fly_jax.bench.traces.replay import ReadRows, plan_trace
from fly_jax.bench.traces.sharegpt import plan_sharegpt
from fly_jax.bench.workload_fields import Fields
from fly_jax.bench.workload_files import find_workload, read_workload
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError

_TRACES: dict[str, ReadRows] = {"azure": azure_rows, "burstgpt": burstgpt_rows, "mooncake": mooncake_rows}
KINDS = ("random", "sharegpt", *_TRACES)


def plan(name_or_path: str, *, dataset_path: Path | None, limits: PlanLimits, seed: int) -> list[PlannedRequest]:
    """The requests of a workload, by ``at``: the same for the same arguments and files.

    Args:
        name_or_path: of a file in ``bench/workloads``, or the path of another.
        dataset_path: the trace, for workloads that replay one.

    Raises:
        ConfigError: the workload, its trace or the seed is wrong; see ``bench/workloads/README.md``.
    """
    return list(plan_in_full(name_or_path, dataset_path=dataset_path, limits=limits, seed=seed).requests)


def plan_in_full(name_or_path: str, *, dataset_path: Path | None, limits: PlanLimits, seed: int) -> WorkloadPlan:
    """What ``plan`` plans, with the number of requests that were clipped and of entries that were skipped.

    Raises:
        ConfigError: as ``plan``.
    """
    fields = read_workload(find_workload(name_or_path))
    kind = fields.text("kind")
    if kind not in KINDS:
        raise fields.wrong("kind", f"one of {', '.join(KINDS)}")
    planned = _plan(fields, kind, dataset_path, limits, seed)
    if not planned.requests:
        raise fields.error("no request arrives before the workload ends; raise its seconds or its rates")
    return planned


def _plan(fields: Fields, kind: str, dataset: Path | None, limits: PlanLimits, seed: int) -> WorkloadPlan:
    if kind == "random":
        if dataset is not None:
            raise ConfigError(f"{fields.file} makes its requests up and takes no --dataset-path, got {dataset}")
        return plan_synthetic(fields, limits, seed)
    if dataset is None:
        raise ConfigError(f"{fields.file} replays a trace of the {kind} format: give its file with --dataset-path")
    if kind == "sharegpt":
        return plan_sharegpt(fields, dataset, limits, seed)
    return plan_trace(fields, dataset, _TRACES[kind], limits, seed)
