"""What running programs need besides weights and KV, and the KV blocks that leave room for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import pytest

from fly_jax.device.executables import ProgramLowerer, compile_all
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.program_memory import largest_keys, working_bytes
from fly_jax.engine import loader
from fly_jax.engine.plan import EnginePlan, fitting_blocks, plan_engine, weight_bytes, with_kept_free
from fly_jax.errors import ModelTooLargeError
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.launch import ExecutableKey, StepKind
from tests.support import small_config
from tests.tiny_models import CASES, write_model


def small_plan(folder: Path, **options: Any) -> EnginePlan:
    write_model(folder, CASES["llama_mha"])
    return plan_engine(small_config(folder, **options))


def compile_for(plan: EnginePlan, keys: list[ExecutableKey]) -> dict[ExecutableKey, jax.stages.Compiled]:
    lowerer = ProgramLowerer(plan.shapes, DeviceMeshes(plan.devices, plan.base_tp))
    workers = os.cpu_count() or 1
    return compile_all(lowerer, keys, workers=workers, optimization_level=0, progress=lambda *_: None).programs


@pytest.mark.slow
def test_the_largest_programs_stand_for_all(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    keys = [key for group in plan.groups for key in plan.shapes.keys(group)]
    keys += plan.shapes.relayout_keys(plan.groups)
    programs = compile_for(plan, keys)
    largest = largest_keys(plan.shapes, plan.groups)
    assert len(largest) < len(keys)
    measured = working_bytes(programs[key] for key in largest)
    assert measured == working_bytes(programs.values())
    for key, program in programs.items():
        memory = program.memory_analysis()
        assert memory is not None
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert measured >= memory.temp_size_in_bytes + 2 * results, key


def test_one_group_of_each_size_is_measured_at_its_largest_buckets(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    steps = [key for key in largest_keys(plan.shapes, plan.groups) if key.kind is not StepKind.RELAYOUT]
    assert {key.group for key in steps} == {DeviceGroup(0, 1), DeviceGroup(0, 2), DeviceGroup(0, 4)}
    assert len(steps) == 3 * 4
    for key in steps:
        assert key.bucket == max(k.bucket for k in plan.shapes.keys(key.group) if k.kind is key.kind)


def test_a_relayout_of_a_later_group_is_measured(tmp_path: Path) -> None:
    """The first pair of devices has no narrower groups here, so only the second moves KV."""
    shapes = small_plan(tmp_path).shapes
    groups = (DeviceGroup(2, 1), DeviceGroup(3, 1), DeviceGroup(0, 2), DeviceGroup(2, 2))
    relayouts = [key for key in largest_keys(shapes, groups) if key.kind is StepKind.RELAYOUT]
    assert {key.group for key in relayouts} == {DeviceGroup(2, 2)}
    assert {str(key.splits) for key in relayouts} == {"1->2", "2->1"}


@pytest.mark.parametrize(
    ("wanted", "kept_free", "blocks"), [(None, 0, 60), (None, 1, 59), (None, 590, 1), (7, 0, 7), (7, 530, 7)]
)
def test_blocks_leave_what_is_kept_free(wanted: int | None, kept_free: int, blocks: int) -> None:
    assert fitting_blocks(wanted, 10, memory=1000, weights=400, kept_free=kept_free) == blocks


@pytest.mark.parametrize(("wanted", "kept_free"), [(7, 531), (None, 591), (1, 700), (0, 0)])
def test_blocks_that_do_not_fit_are_refused_with_both_values(wanted: int | None, kept_free: int) -> None:
    with pytest.raises(ModelTooLargeError) as caught:
        fitting_blocks(wanted, 10, memory=1000, weights=400, kept_free=kept_free)
    blocks = 1 if wanted is None else wanted
    assert f"{blocks} KV blocks of 10 bytes" in str(caught.value)
    assert f"{kept_free} kept free for programs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_is_made_again_with_memory_kept_free(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, num_blocks=10)
    needed = weight_bytes(plan.shapes.model, plan.base_tp) + 10 * plan.shapes.kv.block_bytes
    plan = plan_engine(small_config(tmp_path, num_blocks=10, device_memory_bytes=needed + 1000))
    assert with_kept_free(plan, 1000) == plan
    with pytest.raises(ModelTooLargeError, match=r"10 KV blocks of .* 1,001 kept free"):
        with_kept_free(plan, 1001)


@pytest.mark.slow
def test_the_loader_measures_the_largest_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_JAX_CACHE_DIR", "/proc/none")  # the setting is the whole process's
    plan = small_plan(tmp_path)
    reports: list[tuple[str, int, int]] = []
    largest = largest_keys(plan.shapes, plan.groups)
    measured = loader.measure_working_bytes(plan, lambda *report: reports.append(report))
    assert measured == working_bytes(compile_for(plan, largest).values())
    assert reports[-1] == ("measuring", len(largest), len(largest))
