"""Timing of attention over a paged KV cache on the first device."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from fly_jax.bench.attention_work import (
    Heads,
    Work,
    compile_paged,
    random_pool,
    time_jax_contiguous,
    time_paged,
    time_torch_sdpa,
    torch_on_gpu,
)
from fly_jax.bench.kernel_results import Rates, Row
from fly_jax.bench.timing import copy_bytes_per_second, matmul_flops_per_second
from kernels_pallas import AttentionBackend, attention_backend, default_backend, storage_dtype

# Longer prompts come in chunks of this many tokens.
PROMPT_CHUNK, LONGEST_WHOLE_PROMPT = 2048, 16_384
# Share of the device's memory that a pool may take, beside others' contiguous copies.
POOL_SHARE = 0.25
# A compiled call, or why there is none.
Program = jax.stages.Compiled | Exception


@dataclass(frozen=True)
class Grid:
    """What is measured where nobody says otherwise.

    Attributes:
        contexts, batches: of decodes.
        prompts: contexts of prompts.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    copy_bytes: int
    matmul_width: int
    budget_seconds: float


_CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
ON_GPU = Grid(_CONTEXTS, (1, 8, 32, 128, 256), _CONTEXTS, 2 * 10**9, 8192, 0.1)
# A CPU takes seconds for what a GPU does in milliseconds; the point there is that everything runs.
ON_CPU = Grid((512, 2048), (1, 8), (512,), 256 * 10**6, 1024, 0.05)


class Bench:
    """Measures on the first device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, jax.devices()[0]
        self.backend = default_backend(self.device) if options.backend == "auto" else options.backend
        self.grid = ON_GPU if self.device.platform == "gpu" else ON_CPU
        self.heads = Heads(options.kv_heads, options.group, options.head_dim)
        self.has_torch = torch_on_gpu()
        self._pool: jax.Array | None = None

    def rates(self) -> Rates:
        grid = self.grid
        return Rates(
            copy_bytes_per_second(grid.copy_bytes, grid.budget_seconds),
            matmul_flops_per_second(grid.matmul_width, jnp.bfloat16, grid.budget_seconds),
        )

    def work(self) -> tuple[list[Work], list[Work]]:
        """Of every context its prompts and decodes, in the order in which they were asked for; those that do not fit.

        Time may run out, so what is asked for first comes first.
        """
        options, grid, room = self.options, self.grid, self._pool_bytes()
        batches, contexts = options.batches or grid.batches, options.contexts or grid.contexts
        prompts = options.contexts or grid.prompts
        work = []
        for context in contexts:
            work += [self.one(tp, batch, context, 1) for batch in batches for tp in options.degrees]
            if context in prompts:
                new = context if context <= LONGEST_WHOLE_PROMPT else PROMPT_CHUNK
                work += [self.one(tp, 1, context, new) for tp in options.degrees]
        return [each for each in work if each.pool_bytes <= room], [each for each in work if each.pool_bytes > room]

    def measured(self, work: list[Work], rates: Rates, failed: list[str]) -> Iterator[Row]:
        """Times them in order; what fails is said in ``failed`` and takes no other with it."""
        names = tuple(dict.fromkeys((self.backend, *(("xla",) if "xla" in self.options.beside else ()))))
        backends = {name: attention_backend(name, self.device) for name in names}
        for few in _in_turns(work):
            programs = self.compile_all([(each, backend) for each in few for backend in backends.values()])
            for each in few:
                mine = dict(zip(names, itertools.islice(programs, len(names)), strict=True))
                try:
                    yield self._row(each, mine, rates)
                except jax.errors.JaxRuntimeError as error:
                    failed.append(f"{each}: {str(error).splitlines()[0][:200]}")

    def _row(self, work: Work, programs: dict[str, Program], rates: Rates) -> Row:
        budget, beside = self.grid.budget_seconds, self.options.beside
        seconds = {name: self.time(work, program) for name, program in programs.items()}
        mine, amount = seconds[self.backend], self.amount(work)
        return Row(
            kind="decode" if work.queries == 1 else "prefill",
            tp=work.tp, batch=work.batch, context=work.context, queries=work.queries, backend=self.backend,
            us=mine * 1e6, rate=amount / mine, share=amount / mine / self.best(work, rates),
            xla_us=_us(seconds.get("xla")),
            jax_us=_us(time_jax_contiguous(work, budget)) if "jax" in beside else None,
            torch_us=_us(time_torch_sdpa(work, budget)) if "torch" in beside and self.has_torch else None,
        )  # fmt: skip

    def compile_all(self, todo: Sequence[tuple[Work, AttentionBackend]]) -> Iterator[Program]:
        """On all cores, before any is timed; one that fails is an error in its place."""

        def compiled(one: tuple[Work, AttentionBackend]) -> Program:
            try:
                return compile_paged(*one, self._pool_struct(one[0]))
            except jax.errors.JaxRuntimeError as error:  # raised where the program is timed
                return error

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return iter(list(threads.map(compiled, todo)))

    def time(self, work: Work, program: Program) -> float:
        """Seconds a call.

        Raises:
            JaxRuntimeError: it could not be compiled or run.
        """
        if isinstance(program, Exception):
            raise program
        return time_paged(work, program, self._pool_of(work), self.grid.budget_seconds)

    @staticmethod
    def amount(work: Work) -> int:
        """Bytes of a decode, FLOPs of a prompt."""
        return work.bytes_read if work.queries == 1 else work.flops

    @staticmethod
    def best(work: Work, rates: Rates) -> float:
        return rates.copy_bytes_per_second if work.queries == 1 else rates.matmul_flops_per_second

    def one(self, tp: int, batch: int, context: int, queries: int) -> Work:
        return Work(self.heads, tp, self.options.block_size, batch, context, queries)

    def _pool_bytes(self) -> int:
        stats = self.device.memory_stats() or {}
        return int(POOL_SHARE * stats.get("bytes_limit", 4 * 10**9))

    def _num_blocks(self, work: Work) -> int:
        """Rounded up to a power of two where there is room, so that one pool serves several contexts."""
        num_blocks = 1 << (work.num_blocks - 1).bit_length()
        return num_blocks if num_blocks * work.spec.block_bytes <= self._pool_bytes() else work.num_blocks

    def _pool_struct(self, work: Work) -> jax.ShapeDtypeStruct:
        shape = (self._num_blocks(work), work.spec.block_elements)
        return jax.ShapeDtypeStruct(shape, storage_dtype(work.dtype))

    def _pool_of(self, work: Work) -> jax.Array:
        """A pool of the work's shape; kept, since most pieces of work share a few shapes."""
        shape = self._pool_struct(work).shape
        if self._pool is None or self._pool.shape != shape:
            self._pool = None  # before the next is made: there may not be room for both
            self._pool = random_pool(shape[0], replace(work.spec, num_blocks=shape[0]), work.dtype)
        return self._pool


def _in_turns(work: list[Work]) -> Iterator[list[Work]]:
    """As many at a time as there are cores to compile them on; none is timed meanwhile."""
    width = os.cpu_count() or 1
    return (work[start : start + width] for start in range(0, len(work), width))


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6
