"""State that lives on the devices across steps: the KV pools and the latest sampled tokens, one array a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, SingleDeviceSharding

from fly_jax.device.meshes import DeviceMeshes
from fly_jax.layout import DeviceGroup
from fly_jax.models.sharding import TP_AXIS

BY_RANK = PartitionSpec(TP_AXIS, None)


class DeviceArrays:
    """One array of the same shape on each device, owned here and by nobody else.

    Hands out each group's arrays as one, a rank's rows being its device's array, to be donated to one launch and
    rebound from its result. Wrapping takes 8 us a device, so it is done when a device changes group and never per step.
    """

    def __init__(self, meshes: DeviceMeshes, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.meshes = meshes
        self.device_shape, self.dtype = shape, np.dtype(dtype)
        self._arrays: dict[int, Array] = {
            index: _zeros(shape, self.dtype, device) for index, device in enumerate(meshes.devices)
        }
        self._wrapped: dict[DeviceGroup, Array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on all devices together."""
        return int(np.prod(self.device_shape)) * self.dtype.itemsize * len(self.meshes.devices)

    def shape(self, group: DeviceGroup) -> tuple[int, int]:
        """Of the group's array: ``[devices * rows, columns]``."""
        rows, columns = self.device_shape
        return (group.num_devices * rows, columns)

    def take(self, group: DeviceGroup) -> Array:
        """The group's arrays as one; donated to a launch, :meth:`put_back` must follow with its result."""
        if group not in self._wrapped:
            self._unwrap_overlapping(group)
            arrays = [self._arrays.pop(index) for index in group.rank_order(self.meshes.base_tp)]
            sharding = self.meshes.sharding(group, BY_RANK)
            self._wrapped[group] = jax.make_array_from_single_device_arrays(self.shape(group), sharding, arrays)
        return self._wrapped[group]

    def put_back(self, group: DeviceGroup, arrays: Array) -> None:
        """Rebinds the group's arrays to what a launch returned."""
        self._wrapped[group] = arrays

    def _unwrap_overlapping(self, group: DeviceGroup) -> None:
        for other in [each for each in self._wrapped if each.overlaps(group)]:
            shards = {shard.device: shard.data for shard in self._wrapped.pop(other).addressable_shards}
            self._arrays.update({index: shards[self.meshes.devices[index]] for index in other.device_indices})


def _zeros(shape: tuple[int, int], dtype: np.dtype, device: jax.Device) -> Array:
    """An array that a program on the device makes there, as a pool may be larger than the host's memory.

    ``jnp.zeros(..., device=device)`` would make it on the first device and copy it, and virtual CPU devices would share
    its buffer; the arrays are donated and written.
    """
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=SingleDeviceSharding(device))()
