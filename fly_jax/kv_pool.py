"""The KV pools on the devices: one flat array a device, owned here and by nobody else."""

from __future__ import annotations

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from fly_jax.device_groups import DeviceMeshes
from fly_jax.kv_cache import KVCacheSpec
from fly_jax.layout import DeviceGroup
from fly_jax.models.sharding import TP_AXIS

POOL_PARTITION = PartitionSpec(TP_AXIS, None)


class KVPool:
    """Hands out each device's pool wrapped for a group, to be donated to one step and rebound from its result.

    A group's array is ``[ranks * num_blocks, block_elements]``, a device's rows being its pool. Wrapping takes
    8 us a device, so it is done when a device changes group and never per step.
    """

    def __init__(self, spec: KVCacheSpec, meshes: DeviceMeshes, dtype: np.dtype) -> None:
        self.spec = spec
        self.meshes = meshes
        self.dtype = np.dtype(dtype)
        zeros = np.zeros((spec.num_blocks, spec.block_elements), self.dtype)
        # may_alias=False: pools are donated and written, so virtual CPU devices must not share one host array.
        self._pools = [jax.device_put(zeros, device, may_alias=False) for device in meshes.devices]
        self._wrapped: dict[DeviceGroup, Array] = {}

    @property
    def nbytes(self) -> int:
        return self.spec.num_blocks * self.spec.block_elements * self.dtype.itemsize * len(self._pools)

    def shape(self, group: DeviceGroup) -> tuple[int, int]:
        return (group.size * self.spec.num_blocks, self.spec.block_elements)

    def take(self, group: DeviceGroup) -> Array:
        """The group's pools, to be donated; :meth:`put_back` must follow before anything else is taken."""
        if group not in self._wrapped:
            self._unwrap_overlapping(group)
            pools = [self._pools[index] for index in group.rank_order(self.meshes.base_tp)]
            sharding = self.meshes.sharding(group, POOL_PARTITION)
            self._wrapped[group] = jax.make_array_from_single_device_arrays(self.shape(group), sharding, pools)
            for index in group.device_indices:
                self._pools[index] = None
        return self._wrapped[group]

    def put_back(self, group: DeviceGroup, pools: Array) -> None:
        """Rebinds the group's pools to what a step returned."""
        self._wrapped[group] = pools

    def _unwrap_overlapping(self, group: DeviceGroup) -> None:
        for other in [g for g in self._wrapped if g.overlaps(group)]:
            shards = {shard.device: shard.data for shard in self._wrapped.pop(other).addressable_shards}
            for index in other.device_indices:
                self._pools[index] = shards[self.meshes.devices[index]]
