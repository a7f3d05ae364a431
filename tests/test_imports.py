"""The rooms of the code, from the ground up: imports point down, and what schedules needs no JAX."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
# Programs beside the product, which put its parts together.
NOT_ROOMS = ("checkpoints.demo",)


def modules() -> dict[str, Path]:
    found = {}
    for top in ("checkpoints", "fly_jax", "kernels_pallas", "serving"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith(NOT_ROOMS):
                found[name] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports anywhere in it, for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fly_jax" else parts[0]


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
    assert {room_of(name) for name in MODULES} == set(FLOOR_OF)
