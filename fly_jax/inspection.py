"""What XLA made of a program: collectives, aliasing, temporaries, and arrays that should not exist.

Used by the tests and by ``make check-h200`` to prove that steps run in place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax

# Instructions that give an array another name or update it in place, but make no new one.
_NO_COPY = frozenset({
    "parameter", "bitcast", "get-tuple-element", "tuple", "while", "scatter", "dynamic-update-slice", "opt-barrier",
    "conditional", "call",
})  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")
# A kernel whose result is one of its arguments, written in place.
_ALIASED_CALL = re.compile(r" custom-call\(.*output_to_operand_aliasing=")
_ALL_REDUCE = re.compile(r" all-reduce(?:-start)?\(")


@dataclass(frozen=True)
class Instruction:
    """One instruction of the optimised HLO that yields an array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    opcode: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ProgramReport:
    """A compiled program, as XLA left it.

    Attributes:
        all_reduces: collectives that sum over the group.
        aliased_bytes: bytes of outputs that reuse a donated argument's memory, on one device.
        temporary_bytes, argument_bytes: on one device.
        instructions: of all computations that are not fused into others.
    """

    all_reduces: int
    aliased_bytes: int
    temporary_bytes: int
    argument_bytes: int
    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> ProgramReport:
        text = compiled.as_text() or ""
        memory = compiled.memory_analysis()
        assert memory is not None, "this backend has no memory analysis"
        return cls(
            all_reduces=len(_ALL_REDUCE.findall(text)),
            aliased_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            argument_bytes=memory.argument_size_in_bytes,
            instructions=tuple(_instructions(text)),
        )

    def new_arrays(self, elements: int) -> list[Instruction]:
        """Instructions that make a new array of exactly this many elements, such as a copied or converted pool."""
        return [i for i in self.instructions if i.elements == elements and i.opcode not in _NO_COPY]

    def new_arrays_shaped(self, shape: tuple[int, ...]) -> list[Instruction]:
        """Instructions that make a new array of this shape or its transpose, such as a copied or converted weight."""
        shapes = (shape, shape[::-1])
        return [i for i in self.instructions if i.shape in shapes and i.opcode not in _NO_COPY]


def _instructions(text: str) -> Iterator[Instruction]:
    """Array-valued instructions outside fused computations; a fusion counts as one, unless it only updates in place."""
    in_place = _in_place_fusions(text)
    for computation in text.split("\n\n"):
        header = computation.lstrip().split("\n", 1)[0]
        if "fused_computation" in header or "wrapped_" in header:
            continue
        for line in computation.splitlines():
            if match := _INSTRUCTION.match(line):
                name, dtype, dims, opcode = match.groups()
                called = re.search(r"calls=%?([\w.\-]+)", line)
                if (opcode == "fusion" and called and called[1] in in_place) or _ALIASED_CALL.search(line):
                    opcode = "dynamic-update-slice"
                shape = tuple(int(d) for d in dims.split(",")) if dims else ()
                yield Instruction(name, dtype, shape, opcode)


def _in_place_fusions(text: str) -> set[str]:
    """Fused computations whose result is a slice update or scatter of one of their own parameters."""
    names = set()
    for computation in text.split("\n\n"):
        header = re.match(r"\s*%?([\w.\-]+) \(", computation)
        roots = [line for line in computation.splitlines() if line.lstrip().startswith("ROOT ")]
        if header and roots and re.search(r" (?:dynamic-update-slice|scatter|bitcast)\(", roots[-1]):
            names.add(header[1])
    return names
