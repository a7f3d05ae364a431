"""Workloads: which requests a benchmark sends, and when. ``bench/workloads/README.md`` describes the files."""

from __future__ import annotations

from pathlib import Path

from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.synthetic import plan_synthetic
from fly_jax.bench.traces.azure import azure_rows
from fly_jax.bench.traces.burstgpt import burstgpt_rows
from fly_jax.bench.traces.mooncake import mooncake_rows
from fly_jax.bench.traces.replay import ReadRows, plan_trace
from fly_jax.bench.traces.rows import open_trace
from fly_jax.bench.traces.sharegpt import plan_sharegpt
from fly_jax.bench.workload_fields import Fields
from fly_jax.bench.workload_files import (
    AZURE,
    BURSTGPT,
    KINDS,
    MOONCAKE,
    RANDOM,
    SHAREGPT,
    find_workload,
    read_workload,
)
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError

_TRACES: dict[str, ReadRows] = {AZURE: azure_rows, BURSTGPT: burstgpt_rows, MOONCAKE: mooncake_rows}


def kind_of(name_or_path: str, dataset_path: Path | None) -> str:
    """What a workload is of, one of ``KINDS``, if its file and that of its dataset are there.

    Raises:
        ConfigError: they are not, or a dataset is given that it has no use for.
    """
    return _kind(read_workload(find_workload(name_or_path)), dataset_path)


def plan(name_or_path: str, *, dataset_path: Path | None, limits: PlanLimits, seed: int) -> WorkloadPlan:
    """The requests of a workload, by ``at``: the same for the same arguments and files.

    Args:
        name_or_path: of a file in ``bench/workloads``, or the path of another.
        dataset_path: for workloads that are not made up.

    Raises:
        ConfigError: the workload, its dataset or the seed is wrong; see ``bench/workloads/README.md``.
    """
    fields = read_workload(find_workload(name_or_path))
    kind = _kind(fields, dataset_path)
    planned = _plan(fields, kind, dataset_path, limits, seed)
    if not planned.requests:
        raise fields.error("no request arrives before the workload ends; raise its seconds or its rates")
    return planned


def _kind(fields: Fields, dataset: Path | None) -> str:
    kind = fields.text("kind")
    if kind not in KINDS:
        raise fields.wrong("kind", f"one of {', '.join(KINDS)}")
    if kind == RANDOM:
        if dataset is not None:
            raise ConfigError(f"{fields.file} makes its requests up and takes no --dataset-path, got {dataset}")
    elif dataset is None:
        raise ConfigError(f"{fields.file} is of the {kind} format: give a file of it with --dataset-path")
    elif not dataset.is_fifo():  # which can be read only once
        open_trace(dataset).close()
    return kind


def _plan(fields: Fields, kind: str, dataset: Path | None, limits: PlanLimits, seed: int) -> WorkloadPlan:
    if dataset is None:
        return plan_synthetic(fields, limits, seed)
    if kind == SHAREGPT:
        return plan_sharegpt(fields, dataset, limits, seed)
    return plan_trace(fields, dataset, _TRACES[kind], limits, seed)
