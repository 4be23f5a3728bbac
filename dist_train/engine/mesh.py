"""The ranks as fsdp2 sees them, and its collectives: torch's hooks make them, and views and given gradients by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_train.engine.order import Order
from dist_train.world import World


class Mesh:
    """Groups of `degree` ranks that follow each other; each group holds everything, its ranks a share of it.

    Attributes:
        devices: torch's mesh, of the axis "shard"; with several groups of "replicate" and "shard".
        place: this rank's number in its group. replica: the number of its group.
    """

    def __init__(self, world: World, degree: int) -> None:
        self.degree, self.replicas = degree, world.size // degree
        self.place, self.replica = world.rank % degree, world.rank // degree
        self.devices = _devices(world, degree)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """The sum over all ranks of what each of a group holds, (degree, n): this rank's row of it."""
        mine = rows.reshape(-1)
        if self.degree > 1:
            every = mine
            mine = every.new_empty(len(every) // self.degree)
            dist.reduce_scatter_tensor(mine, every, group=self.devices.get_group("shard"))
        if self.replicas > 1:
            dist.all_reduce(mine, group=self.devices.get_group("replicate"))
        return mine

    def join_rows(self, mine: Tensor) -> Tensor:
        """What each rank of a group holds, (n,), as rows: (degree, n)."""
        every = mine
        if self.degree > 1:
            every = mine.new_empty(self.degree * len(mine))
            dist.all_gather_into_tensor(every, mine, group=self.devices.get_group("shard"))
        return every.view(self.degree, -1)


def _devices(world: World, degree: int) -> DeviceMesh:
    """The mesh, whose subgroups are made once."""
    everyone = dist.group.WORLD
    assert everyone is not None, "run.needs_group"
    key = (everyone, degree)
    if key not in _MESHES:
        ranks = torch.arange(world.size).view(-1, degree)
        if degree == world.size:
            _MESHES[key] = DeviceMesh.from_group(
                everyone, world.device.partition(":")[0], mesh_dim_names=("shard",)
            )
        else:
            make = dist.new_subgroups_by_enumeration
            across, _ = make(ranks.T.tolist(), timeout=world.timeout)
            within, _ = make(ranks.tolist(), timeout=world.timeout)
            _MESHES[key] = DeviceMesh.from_group(
                [across, within],
                world.device.partition(":")[0],
                mesh=ranks,
                mesh_dim_names=("replicate", "shard"),
            )
    return _MESHES[key]


_MESHES: dict[Any, DeviceMesh] = {}


class _Noted:
    """A collective that torch's hooks make for one block, noted in an `Order`."""

    def __init__(self, order: Order, block: int) -> None:
        self.order, self.name = order, f"{type(self).__name__} {block}"

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Noted):
    """torch's own, noted."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.order.note(self.name)
        return dist.all_gather_into_tensor(
            output_tensor, input_tensor, group=group, async_op=async_op
        )


class ReduceScatter(_Noted):
    """torch's own, noted."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.order.note(self.name)
        return dist.reduce_scatter_tensor(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
