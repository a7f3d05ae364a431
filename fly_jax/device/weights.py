"""The weights manager: weights sit once in each device's memory and every layout sees them through views."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

from fly_jax.device.meshes import DeviceMeshes
from fly_jax.device.views import view_rows
from fly_jax.layout import DeviceGroup
from fly_jax.models.sharding import ModelSpec, ModuleSpec, ParameterSpec


class WeightsManager:
    """Resident buffers of every device, and global arrays over them for every group.

    With base TP m, device i holds rows ``[s/m, (s+1)/m)``, ``s = i % m``, of each sharded buffer and all of each
    replicated one. Buffers are written once and never donated: donating one view would delete the others.

    Args:
        resident: the buffers of each device by name, in device order.
    """

    def __init__(self, spec: ModelSpec, meshes: DeviceMeshes, resident: tuple[dict[str, Array], ...]) -> None:
        self.spec = spec
        self.meshes = meshes
        self.base_tp = meshes.base_tp
        self.resident = jax.block_until_ready(resident)
        self._host: list[Mapping[str, np.ndarray]] = []

    @classmethod
    def from_host(cls, spec: ModelSpec, meshes: DeviceMeshes, host: list[Mapping[str, np.ndarray]]) -> WeightsManager:
        """
        Args:
            host: for each base shard ``s``, its prepared buffers by name. Arrays are 64-byte aligned, so that CPU
                devices alias them instead of copying: replicas of virtual devices are one host copy.
        """
        resident = tuple(
            {name: jax.device_put(array, device) for name, array in host[index % meshes.base_tp].items()}
            for index, device in enumerate(meshes.devices)
        )
        weights = cls(spec, meshes, resident)
        weights._host = host  # CPU devices alias it
        return weights

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on all devices together; the same in every layout."""
        return sum(array.nbytes for buffers in self.resident for array in buffers.values())

    def addresses(self, group: DeviceGroup) -> dict[int, int]:
        """Where the bytes of a group's views lie: address -> bytes. A change of layout leaves them there."""
        leaves = (*self.decoder(group), *self.head(group))
        shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
        return {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}

    def decoder(self, group: DeviceGroup) -> tuple[Array, ...]:
        """The decoder's leaves as the group sees them."""
        return self._wrap(group, self.spec.decoder)

    def head(self, group: DeviceGroup) -> tuple[Array, ...]:
        """The LM head's leaves as the group sees them."""
        return self._wrap(group, self.spec.head)

    def _wrap(self, group: DeviceGroup, module: ModuleSpec) -> tuple[Array, ...]:
        return tuple(self._global_array(group, parameter) for parameter in module.parameters)

    def _global_array(self, group: DeviceGroup, parameter: ParameterSpec) -> Array:
        shards = [
            self._shard(device, rank, group.tp, parameter) for rank, device in enumerate(group.rank_order(self.base_tp))
        ]
        sharding = self.meshes.sharding(group, parameter.partition)
        return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)

    def _shard(self, device: int, rank: int, degree: int, parameter: ParameterSpec) -> Array:
        base = self.resident[device][parameter.buffer]
        if not parameter.sharded:
            return base
        rows = parameter.shape[0] // degree
        resident_start = 0
        if base.shape[0] != parameter.shape[0]:
            resident_start = (device % self.base_tp) * base.shape[0]
        start = rank * rows - resident_start
        return view_rows(base, start, start + rows)
