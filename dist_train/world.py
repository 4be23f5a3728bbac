"""Who takes part in a run: the ranks, their device, and what they tell each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dist_train.errors import UserError
from dist_train.rendezvous import meet, on_one_machine, share_a_gpu

COLLECTIVE_TIMEOUT = timedelta(seconds=float(os.environ.get("DIST_TRAIN_TIMEOUT", "600")))
"""How long a rank waits in a collective for the others before it fails. Never torch's 30 minutes."""
START_TIMEOUT = timedelta(minutes=5)
"""How long the ranks wait for each other at the start."""


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: str = "cpu"
    device_count: int = 1
    timeout: timedelta = COLLECTIVE_TIMEOUT
    """How long a rank waits for the others in a collective."""

    @property
    def devices(self) -> list[str]:
        """The devices of this rank, `device` first; on CPU there is one, as often as asked for."""
        kind, _, index = self.device.partition(":")
        if not index:
            return [kind] * self.device_count
        return [f"{kind}:{int(index) + i}" for i in range(self.device_count)]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        group: bool = False,
        timeout: timedelta | None = None,
        devices: int = 1,
    ) -> World:
        """Take the place that the launcher (torchrun, accelerate, deepspeed, ours) gave in RANK, WORLD_SIZE, ....

        A task of plain `srun` takes it from Slurm's own variables. Without those this process is the whole world.
        `group` asks for a process group even then (DeepSpeed cannot do without one). A collective fails after
        `timeout`, by default COLLECTIVE_TIMEOUT. Of GPUs each rank takes `devices`; UserError where there are fewer.
        """
        import torch
        import torch.distributed as dist

        place = slurm_place(environ)
        os.environ.update(place)  # where torch looks for MASTER_ADDR
        environ = {**environ, **place}
        rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        local_rank = int(environ.get("LOCAL_RANK", rank))
        local_size = int(
            environ.get("LOCAL_WORLD_SIZE", environ.get("DIST_TRAIN_LOCAL_SIZE", size))
        )
        if torch.cuda.is_available():
            there = torch.cuda.device_count()
            if devices > 1 and local_size * devices > there:
                raise UserError(
                    f"placement: needs {devices} GPUs for each of {local_size} ranks of this machine, which has {there}"
                )
            device = f"cuda:{local_rank * devices % there}"
            torch.cuda.set_device(device)
        else:
            device = "cpu"
        timeout = timeout or COLLECTIVE_TIMEOUT
        if (size > 1 or group) and not dist.is_initialized():
            store = meet(environ, rank, size, min(timeout, START_TIMEOUT))
            nccl = device != "cpu" and not share_a_gpu(
                store, size, str(torch.cuda.get_device_properties(device).uuid)
            )
            if on_one_machine(environ) and not nccl:
                os.environ.setdefault(
                    "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
                )
            dist.init_process_group(
                "nccl" if nccl else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        return cls(rank, size, local_rank, local_size, device, devices, timeout)

    @classmethod
    def alone(cls, environ: Mapping[str, str] = os.environ, *, devices: int = 1) -> World:
        """A world of this process only, though it is one of the ranks of a launcher: on the device of its place, and
        with its share of the machine's cores."""
        place = {**environ, **slurm_place(environ)}
        local = place.get("LOCAL_RANK", place.get("RANK", "0"))
        size = place.get("LOCAL_WORLD_SIZE", place.get("DIST_TRAIN_LOCAL_SIZE", "1"))
        own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size}
        return cls.join(own, devices=devices)

    def store(self, name: str) -> Any:
        """The store by which the ranks found each other, for messages beside the collectives; None for one rank."""
        if self.size == 1:
            return None
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store  # nothing public gives it

        return dist.PrefixStore(name, _get_default_store())

    def leave(self) -> None:
        """End this process's part in the process group, if there is one."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def sum_(self, tensor: Any) -> Any:
        """Add `tensor` up over all ranks, in place; returns it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def sum_to_slices(self, tensor: Any) -> Any:
        """Add a 1-D tensor up over all ranks, of as many equal slices as there are ranks: this rank's slice of it."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        mine = tensor.new_empty(tensor.numel() // self.size)
        dist.reduce_scatter_tensor(mine, tensor)
        return mine

    def join_slices(self, mine: Any) -> Any:
        """Every rank's 1-D tensor, all as long, one after the other in a new one."""
        joined = mine.new_empty(mine.numel() * self.size)
        if self.size == 1:
            return joined.copy_(mine)
        import torch.distributed as dist

        dist.all_gather_into_tensor(joined, mine)
        return joined

    def largest(self, number: int) -> int:
        """The largest of every rank's whole number, on every rank."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        every = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return int(every)

    def broadcast_(self, tensor: Any, source: int = 0) -> Any:
        """Overwrite `tensor` with that of rank `source`, in place; returns it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank, on every rank (no pickle crosses the wire)."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(message)
        dist.all_reduce(sizes)
        lengths = sizes.tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [
            json.loads(bytes(part[:length].cpu().numpy()))
            for part, length in zip(parts, lengths, strict=True)
        ]

    def agree(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            import torch

            self.sum_(torch.zeros(1, device=self.device))


def slurm_place(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of `srun`; nothing elsewhere."""
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    tasks: list[str] = []  # of each node: "4(x2),3" is 4, 4, 3
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [count] * int(times or 1)
    place = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(environ["SLURM_NODEID"])],
    }
    if "MASTER_ADDR" not in environ:
        show = ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]]
        names = subprocess.run(show, capture_output=True, text=True, check=True, timeout=60).stdout
        place["MASTER_ADDR"] = names.split()[0]
    if "MASTER_PORT" not in environ:  # below the ports that outgoing connections take
        place["MASTER_PORT"] = str(20000 + int(environ["SLURM_JOB_ID"]) % 12000)
    return place


def threads_a_rank(setting: str | int, local_size: int) -> int:
    """How many threads each of `local_size` ranks of this machine takes: as set, or its share of the cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // local_size) if setting == "auto" else int(setting)


def pin_threads(setting: str | int, local_size: int) -> int:
    """Give this rank its share of the machine's cores; the same number of threads is part of "bit for bit"."""
    import torch

    threads = threads_a_rank(setting, local_size)
    torch.set_num_threads(threads)
    return threads
