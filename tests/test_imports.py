"""The rooms of the code, from the ground up: imports point down, and what schedules needs no JAX."""

from __future__ import annotations

import pytest

from tests.rooms import MODULES, arrows, drawn, imported, picture, room_of

FLOORS = (
    ("kernels_pallas", "fly_jax.errors", "fly_jax.logprobs", "fly_jax.progress"),
    ("fly_jax.host", "fly_jax.layout", "fly_jax.outputs", "fly_jax.platform", "fly_jax.sampling_params"),
    ("fly_jax.config", "fly_jax.kv", "fly_jax.models"),
    ("checkpoints", "fly_jax.scheduling"),
    ("fly_jax.policy",),
    ("fly_jax.device", "fly_jax.switching", "fly_jax.text"),
    ("fly_jax.engine",),
    ("fly_jax.async_engine", "fly_jax.llm"),
    ("fly_jax", "fly_jax.inspection"),
    ("serving",),
    ("fly_jax.cli",),
    ("fly_jax.__main__", "fly_jax.bench"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_JAX = ("kv", "policy", "scheduling", "switching")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    room = room_of(module)
    for name in imported(MODULES[module]):
        other = room_of(name)
        if name in MODULES and other != room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("fly_jax.")))
def test_what_schedules_needs_no_jax(module: str) -> None:
    if module.split(".")[1] in WITHOUT_JAX:
        assert not [name for name in imported(MODULES[module]) if name.split(".")[0] in ("jax", "jaxlib", "flax")]


def test_every_room_has_its_floor() -> None:
    assert set(arrows()) == set(FLOOR_OF)


def test_the_picture_is_of_this_code() -> None:
    assert drawn() == picture(), "python -m tests.rooms draws it again"
