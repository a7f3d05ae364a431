"""The devices themselves: one mesh for each group, made once."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fly_jax.layout import DeviceGroup, all_groups
from fly_jax.models.sharding import TP_AXIS


class DeviceMeshes:
    """Meshes and shardings of every group that some layout can hold.

    Attributes:
        devices: the engine's devices, by index.
    """

    def __init__(self, devices: Sequence[jax.Device], base_tp: int) -> None:
        self.devices = tuple(devices)
        self.base_tp = base_tp
        self._meshes = {group: self._mesh(group) for group in all_groups(len(devices), base_tp)}

    @property
    def groups(self) -> tuple[DeviceGroup, ...]:
        return tuple(self._meshes)

    def ranked(self, group: DeviceGroup) -> tuple[jax.Device, ...]:
        """The group's devices in rank order."""
        return tuple(self.devices[index] for index in group.rank_order(self.base_tp))

    def mesh(self, group: DeviceGroup) -> Mesh:
        return self._meshes[group]

    def sharding(self, group: DeviceGroup, partition: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._meshes[group], partition)

    def replicated(self, group: DeviceGroup) -> NamedSharding:
        return self.sharding(group, PartitionSpec())

    def _mesh(self, group: DeviceGroup) -> Mesh:
        return Mesh(np.array(self.ranked(group)), (TP_AXIS,))
