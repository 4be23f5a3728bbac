"""What a rank hands to collectives, counted while it does so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    Of n bytes over N ranks each sends 2 n (N - 1) / N for a sum that all get, and half of that where n bytes in all
    are gathered or scattered, or go to or come from one rank.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.bytes, self._share = 0.0, (ranks - 1) / ranks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            times, place = COLLECTIVES[func.overloadpacket.__name__]
            self.bytes += times * self._share * _bytes(args[place])
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in value)
