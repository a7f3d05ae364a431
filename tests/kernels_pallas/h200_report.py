"""Compiles every kernel for an H200, without a GPU, and prints what each takes of the chip.

It ends with an error at a kernel that spills registers or wants more shared memory than a program can have.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from fly_jax.bench.results import save
from fly_jax.platform import configure_deviceless_cuda

_DUMP = Path(tempfile.mkdtemp(prefix="fly_jax_h200_"))
configure_deviceless_cuda(_DUMP)

import jax  # noqa: E402  the platform is chosen above
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from kernels_pallas import AttentionOptions, KVLayout, QueryRuns, storage_dtype  # noqa: E402
from kernels_pallas.pallas import PallasBackend  # noqa: E402
from kernels_pallas.tuning import TABLE  # noqa: E402
from tests.h200 import node_of_h200s  # noqa: E402

_MESH = Mesh(np.array(node_of_h200s()[:1]), ("one",))
_KERNELS = ("paged_attention", "paged_attention_combine", "write_kv")
_LAYERS, _BASE_BLOCK, _KV_HEADS = 32, 16, 8
# More than 2^31 elements, as real pools have: offsets must be 64 bits wide.
_POOL_BYTES = 100 * 10**9
_ROWS, _TABLE_BLOCKS, _TILE_QUERIES, _TILES = 64, 512, 16, 128


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every head_dim at every degree, then options, group sizes and types."""
    head_dims = [entry.head_dim for entry in TABLE]
    for head_dim, tp, kind in product(head_dims, (1, 2, 4, 8), ("decode", "prefill", "write")):
        yield kind, {"head_dim": head_dim, "tp": tp}
    others: list[dict[str, Any]] = [
        *({"head_dim": head_dim, "window": 512, "soft_cap": 30.0, "sinks": True} for head_dim in head_dims),
        *({"head_dim": 128, "group": group, "tp": 8} for group in (1, 2, 3, 5, 6, 7, 8, 16)),
        {"head_dim": 128, "window": 4096},
        {"head_dim": 128, "dtype": "float16"},
        {"head_dim": 128, "dtype": "float32"},
        *({"head_dim": head_dim, "chip": "one that the table does not list"} for head_dim in head_dims),
    ]
    for options, kind in product(others, ("decode", "prefill")):
        yield kind, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result-dir", type=Path, help="also write the rows to h200_kernels.json there")
    options = parser.parse_args()
    rows = []
    for kind, case in cases():
        row = {"kind": kind, **case, "kernels": compile_kernels(kind, **case)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    shutil.rmtree(_DUMP)
    if options.result_dir:
        what = "kernels compiled for an H200 without a GPU, none of which spills: make check-h200"
        save(options.result_dir, "h200_kernels", {"what": what, "compiled_for": "NVIDIA H200", "rows": rows})


def compile_kernels(
    kind: str,
    *,
    head_dim: int,
    tp: int = 1,
    group: int = 4,
    dtype: str = "bfloat16",
    chip: str = "NVIDIA H200",
    sinks: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Compiles one call; registers and shared memory by kernel name, as far as they can be read."""
    heads = _KV_HEADS // tp
    layout = KVLayout((_LAYERS, 2, heads, _BASE_BLOCK * tp, head_dim), 1, jnp.dtype(dtype))
    backend = PallasBackend(chip)
    elements = int(np.prod(layout.block_shape))
    num_blocks = _POOL_BYTES // (elements * layout.dtype.itemsize)
    pool = _struct((num_blocks, elements), storage_dtype(layout.dtype))
    if kind == "write":
        tokens = _ROWS
        rows = _struct((tokens, heads, head_dim), dtype)
        places = _struct((tokens,), jnp.int32)

        def write(*arrays: jax.Array) -> jax.Array:
            return backend.write_kv(arrays[0], 3, *arrays[1:], layout)

        return _compile(write, (pool, rows, rows, places, places), donate=True)

    runs, queries = (_ROWS, 1) if kind == "decode" else (_TILES, _TILE_QUERIES)

    def attend(*arrays: jax.Array) -> jax.Array:
        described = QueryRuns(*arrays[2:6])
        return backend.paged_attention(
            arrays[0], arrays[1], 3, described, layout, AttentionOptions(head_dim**-0.5, **options), *arrays[6:]
        )

    query = _struct((runs, queries, heads, group, head_dim), dtype)
    described = (_struct((_ROWS, _TABLE_BLOCKS), jnp.int32), *[_struct((runs,), jnp.int32)] * 3)
    given = (_struct((heads, group), jnp.float32),) if sinks else ()
    return _compile(attend, (query, pool, *described, *given))


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(_MESH, PartitionSpec()))


def _compile(function: Any, arguments: tuple[Any, ...], donate: bool = False) -> dict[str, Any]:
    for file in _DUMP.iterdir():
        file.unlink()
    specs = (PartitionSpec(),) * len(arguments)
    mapped = jax.shard_map(function, mesh=_MESH, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    lowered = jax.jit(mapped, donate_argnums=0 if donate else ()).lower(*arguments)
    compiled = lowered.compile()
    if donate:
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes == arguments[0].size * arguments[0].dtype.itemsize
    found = kernels_in(_DUMP)
    assert not any(kernel["spilled_bytes"] for kernel in found.values()), f"registers are spilled: {found}"
    return found


def kernels_in(dump: Path) -> dict[str, Any]:
    """What XLA dumped of each of our kernels; registers are null where there is no PTX or no ptxas to read them."""
    found: dict[str, Any] = {}
    for file in dump.glob("*.thunk_sequence.txt"):
        for name, size in re.findall(rf" ({'|'.join(_KERNELS)}) grid: .*shared_memory: (\d+) bytes", file.read_text()):
            found[name] = {"registers": None, "spilled_bytes": None, "shared_memory_bytes": int(size)}
    ptxas = _ptxas()
    for file in dump.glob("*.ptx") if ptxas else ():
        code = file.read_text()
        entry = re.search(r"\.entry (\w+)", code)
        if entry and entry[1] in found:
            command = [str(ptxas), "-v", "-arch=sm_90a", str(file), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used = re.search(r"Used (\d+) registers", done.stdout + done.stderr)
            spilled = re.search(r"(\d+) bytes spill stores", done.stdout + done.stderr)
            found[entry[1]]["registers"] = int(used[1]) if used else None
            found[entry[1]]["spilled_bytes"] = int(spilled[1]) if spilled else None
            waits = [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", code)]
            found[entry[1]]["copies_in_flight"] = max(waits, default=0)
    return found


def _ptxas() -> Path | None:
    """The assembler that comes with jax's CUDA packages, or one on the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for path in Path(root).glob("*/bin/ptxas"):
            return path
    on_path = shutil.which("ptxas")
    return Path(on_path) if on_path else None


if __name__ == "__main__":
    main()
