"""What a rank hands to collectives, counted while it does so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES: dict[str, tuple[float, int]] = {
    "allreduce_": (2.0, 0),
    "allreduce_coalesced_": (2.0, 0),
    "reduce_": (1.0, 0),
    "broadcast_": (1.0, 0),
    "allgather_": (1.0, 0),
    "_allgather_base_": (1.0, 0),
    "allgather_into_tensor_coalesced_": (1.0, 0),
    "reduce_scatter_": (1.0, 1),
    "_reduce_scatter_base_": (1.0, 1),
    "reduce_scatter_tensor_coalesced_": (1.0, 1),
    "barrier": (0.0, 0),
}
"""How often torch's collective moves its n bytes, and which of its arguments has them; another one is a KeyError."""


class Payload(TorchDispatchMode):
    """Adds up, in `bytes`, what a ring moves for the collectives within this block: the mean over the ranks.

    Of n bytes over a group of N ranks each sends 2 n (N - 1) / N for a sum that all get, and half of that where n bytes
    in all are gathered or scattered, or go to or come from one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            times, place = COLLECTIVES[func.overloadpacket.__name__]
            ranks = _group(args).size()
            self.bytes += times * (ranks - 1) / ranks * _bytes(args[place])
        return func(*args, **(kwargs or {}))


def _group(arguments: Any) -> Any:
    for value in arguments:
        if isinstance(value, torch.ScriptObject) and value._type().name() == "ProcessGroup":  # type: ignore[attr-defined]
            return dist.ProcessGroup.unbox(value)
    raise AssertionError("a collective without a group")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in value)
