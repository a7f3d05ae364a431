"""Who imports whom, read from the code. ``python -m tests.rooms`` draws it again in ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
# Programs beside the product, which put its parts together.
NOT_ROOMS = ("checkpoints.demo",)
_PICTURE = re.compile(r"(?<=```mermaid\n).*?(?=```\n)", re.DOTALL)


def modules() -> dict[str, Path]:
    """All modules of the product by name."""
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
    """The package of a module; a module of ``fly_jax`` itself is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fly_jax" else parts[0]


def arrows() -> dict[str, set[str]]:
    """Each room's imports of other rooms."""
    found: dict[str, set[str]] = {room_of(name): set() for name in MODULES}
    for name, path in MODULES.items():
        found[room_of(name)] |= {room_of(each) for each in imported(path) if each in MODULES} - {room_of(name)}
    return found


def picture() -> str:
    """The packages in Mermaid's language; an arrow that others imply is left out."""
    packages = {room for room in arrows() if MODULES[room].name == "__init__.py" and room != "fly_jax"}
    uses = {room: others & packages for room, others in arrows().items() if room in packages}
    lines = ["graph TD"]
    for room in sorted(uses):
        implied = {far for near in uses[room] for far in _reached(uses, near)}
        lines += [f"    {_label(room)} --> {_label(other)}" for other in sorted(uses[room] - implied)]
    return "\n".join(lines) + "\n"


def _reached(uses: Mapping[str, set[str]], room: str) -> set[str]:
    found: set[str] = set()
    for other in uses[room]:
        found |= {other} | _reached(uses, other)
    return found


def _label(room: str) -> str:
    return room.removeprefix("fly_jax.")


def drawn() -> str:
    """The picture that the document has."""
    found = _PICTURE.search(DOCUMENT.read_text())
    return found[0] if found else ""


if __name__ == "__main__":
    DOCUMENT.write_text(_PICTURE.sub(lambda _: picture(), DOCUMENT.read_text()))
