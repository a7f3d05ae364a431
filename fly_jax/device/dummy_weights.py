"""Random weights, drawn on the devices from a model's shapes alone: for measuring speed without a download."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from checkpoints import Progress, row_range
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.models.partition import Partition
from fly_jax.models.sharding import ModelSpec, ParameterSpec

# transformers' initializer_range: activations stay of order one.
_DEVIATION = 0.02


def draw_resident(spec: ModelSpec, meshes: DeviceMeshes, seed: int, progress: Progress) -> tuple[dict[str, Array], ...]:
    """The buffers of every device; the same model at every base degree and on every device.

    Each base shard is drawn on the first device that holds it and copied from there; CPU devices share its memory.

    Args:
        progress: called with the bytes that are drawn and the bytes to draw.
    """
    drawn: list[dict[str, Array]] = []
    total, done = sum(buffer.nbytes for buffer in spec.buffers.values()) * meshes.base_tp, 0
    for shard, device in enumerate(meshes.devices[: meshes.base_tp]):
        buffers = {}
        for index, (name, buffer) in enumerate(spec.buffers.items()):
            key = jax.device_put(jax.random.fold_in(jax.random.key(seed, impl="rbg"), index), device)
            buffers[name] = _draw(key, buffer, spec.partition, row_range(buffer, (shard, meshes.base_tp)))
            buffers[name].block_until_ready()  # or the temporaries of several would be there at once
            done += buffer.nbytes
            progress(done, total)
        drawn.append(buffers)
    return tuple(
        {name: _on(array, device) for name, array in drawn[index % meshes.base_tp].items()}
        for index, device in enumerate(meshes.devices)
    )


def _draw(key: Array, buffer: ParameterSpec, part: Partition, rows: tuple[int, int]) -> Array:
    """Some rows of a buffer: ones for norms, uniform values around zero for the rest."""
    if "norm" in buffer.name:
        return jnp.ones((rows[1] - rows[0], *buffer.shape[1:]), buffer.dtype, device=next(iter(key.devices())))
    copied = part if part.kv_copies > 1 and buffer.name.endswith((".qkv", ".qkv_bias")) else None
    return _uniform(key, buffer.shape, buffer.dtype, copied, rows)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _uniform(
    key: Array, shape: tuple[int, ...], dtype: jnp.dtype, copied: Partition | None, rows: tuple[int, int]
) -> Array:
    """One program for all layers: it knows shapes, not names.

    Of 16 random bits a value: on two cores, 67 million take 0.4 s of drawing, and normal ones 2.9 s.
    """
    size = math.prod(shape)
    bits = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    steps = lax.bitcast_convert_type(bits, jnp.int16).reshape(-1)[:size].reshape(shape)
    values = (steps.astype(jnp.float32) * (_DEVIATION * math.sqrt(3) / 2**15)).astype(dtype)
    return (values if copied is None else _with_equal_copies(values, copied))[rows[0] : rows[1]]


def _with_equal_copies(qkv: Array, part: Partition) -> Array:
    """Gives the copies of a KV head one value: which of them is read depends on the TP degree."""
    heads = qkv.reshape(part.units, part.queries_per_unit + 2, part.head_dim, *qkv.shape[1:])
    first = jnp.arange(part.units) // part.kv_copies * part.kv_copies
    return heads.at[:, -2:].set(heads[first, -2:]).reshape(qkv.shape)


def _on(array: Array, device: jax.Device) -> Array:
    if array.devices() == {device}:
        return array
    # Through numpy, a CPU device takes the other's memory as it is; eight copies of a model would not fit the host.
    return jax.device_put(np.asarray(array) if device.platform == "cpu" else array, device)
