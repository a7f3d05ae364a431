"""Weights sit once in each device's memory; every layout is views of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import load_weights
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.views import RowRange, view_rows
from fly_jax.device.weights import WeightsManager
from fly_jax.layout import DeviceGroup, all_groups
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import ModelSpec, ParameterSpec, model_spec
from tests.tiny_models import CASES, write_model

MODELS = ("llama_gqa_tied", "qwen2_heads_7_kv_1", "llama_biases", "llama_ffn_90", "qwen3")


def manager(folder: Path, base_tp: int, dtype: str = "float32") -> WeightsManager:
    spec = model_spec(ModelConfig.from_folder(folder), max_tp=4, dtype=jnp.dtype(dtype))
    host = [load_weights(folder, spec, spec.dtype, base_shard=(s, base_tp)) for s in range(base_tp)]
    return WeightsManager.from_host(spec, DeviceMeshes(jax.devices()[:4], base_tp), host)


def leaves(weights: WeightsManager, group: DeviceGroup) -> Iterator[tuple[ParameterSpec, jax.Array]]:
    spec: ModelSpec = weights.spec
    yield from zip(spec.decoder.parameters, weights.decoder(group), strict=True)
    yield from zip(spec.head.parameters, weights.head(group), strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base_tp", [1, 2, 4])
@pytest.mark.parametrize("case", MODELS)
def test_every_shard_of_every_layout_lies_inside_a_resident_buffer(
    case: str, base_tp: int, dtype: str, tmp_path: Path
) -> None:
    write_model(tmp_path, CASES[case])
    weights = manager(tmp_path, base_tp, dtype)
    for group in all_groups(4, base_tp):
        for parameter, array in leaves(weights, group):
            for shard in array.addressable_shards:
                device = weights.meshes.devices.index(shard.device)
                resident = weights.resident[device][parameter.buffer]
                start = shard.data.unsafe_buffer_pointer() - resident.unsafe_buffer_pointer()
                assert 0 <= start <= resident.nbytes - shard.data.nbytes, (str(group), parameter.name)


@pytest.mark.parametrize("base_tp", [1, 2])
def test_a_shard_holds_the_rows_of_its_rank(base_tp: int, tmp_path: Path) -> None:
    write_model(tmp_path, CASES["llama_gqa_tied"])
    weights = manager(tmp_path, base_tp)
    whole = load_weights(tmp_path, weights.spec, weights.spec.dtype)
    for group in all_groups(4, base_tp):
        for parameter, array in leaves(weights, group):
            np.testing.assert_array_equal(np.asarray(array), whole[parameter.buffer], err_msg=parameter.name)


def test_wrapping_another_layout_adds_no_live_bytes(tmp_path: Path) -> None:
    write_model(tmp_path, CASES["llama_gqa_tied"])
    weights = manager(tmp_path, base_tp=1)

    def live_buffers() -> set[int]:
        shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
        spans = sorted((a.unsafe_buffer_pointer(), a.unsafe_buffer_pointer() + a.nbytes) for a in shards)
        outer, end = set(), 0
        for start, stop in spans:
            if stop > end:
                outer.add(start)
                end = stop
        return outer

    before, bytes_before = live_buffers(), weights.resident_bytes
    kept = [list(leaves(weights, group)) for group in all_groups(4, 1)]
    assert live_buffers() == before
    assert weights.resident_bytes == bytes_before
    assert len(kept) == 7


def test_virtual_cpu_devices_alias_one_host_copy(tmp_path: Path) -> None:
    write_model(tmp_path, CASES["llama_gqa_tied"])
    weights = manager(tmp_path, base_tp=1)
    for name, first in weights.resident[0].items():
        addresses = {buffers[name].unsafe_buffer_pointer() for buffers in weights.resident}
        assert addresses == {first.unsafe_buffer_pointer()}


def test_a_dlpack_capsule_over_a_row_range_aliases_the_buffer() -> None:
    base = jax.device_put(np.arange(1024 * 64, dtype=np.float32).reshape(1024, 64), jax.devices()[0])
    view = jax.dlpack.from_dlpack(RowRange(base, 256, 512), copy=False)
    assert view.unsafe_buffer_pointer() == base.unsafe_buffer_pointer() + 256 * 64 * 4
    np.testing.assert_array_equal(np.asarray(view), np.asarray(base)[256:512])


def test_a_view_that_would_be_a_copy_is_refused() -> None:
    base = jax.device_put(np.zeros((64, 3), np.float32), jax.devices()[0])
    with pytest.raises(RuntimeError, match="copied, not viewed"):
        view_rows(base, 1, 2)  # starts 12 bytes in: CPU aliases only from multiples of 64
