"""What a turn sees of the networks: its own player live, every other player through a frozen view (law 5)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dist_train.errors import nearest
from dist_train.networks.placement import place
from dist_train.networks.precision import AUTOCAST


class Player(nn.Module):
    """The networks that share one optimiser, each called by its name, in the run's precision.

    Under bf16 and fp16 the weights stay fp32 and autocast chooses the type of each operation; outputs come back as
    fp32, so that losses are written once for every precision. With `channels_last` images (N, C, H, W) come in with
    their channels innermost, which convolutions pass on; weights keep their layout, so that they can be sharded.
    With `cuda_graphs` the next replay of a forward writes where the last one did, so outputs are copied out.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        precision: str,
        device_type: str,
        channels_last: bool = False,
        placement: Mapping[str, int] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.precision, self.device_type = precision, device_type
        self.channels_last = channels_last
        self.placement = dict(placement or {})
        self.cuda_graphs = cuda_graphs

    def on(self, devices: Sequence[str]) -> Player:
        """Move the networks to the first device, and what is placed elsewhere to its own."""
        self.to(devices[0])
        if self.placement:
            for network in self.networks.values():
                place(network, self.placement, devices)
        return self

    def forward(self, name: str, *inputs: Any) -> Any:
        if self.channels_last:
            inputs = tuple(_channels_last(value) for value in inputs)
        if self.precision not in AUTOCAST:
            output = self.networks[name](*inputs)
            return tree_map_only(Tensor, torch.clone, output) if self.cuda_graphs else output
        with torch.autocast(self.device_type, AUTOCAST[self.precision]):
            return _to_fp32(self.networks[name](*inputs), copy=self.cuda_graphs)

    def skeleton(self) -> Player:
        """A copy without weights: a function of the weights that a view passes in."""
        return hollow(self, "meta")


def hollow(module: nn.Module, device: str | None = None) -> Any:
    """A copy whose weights and buffers are new and have no values; by default where the module's own are."""
    kept = {id(b): torch.empty_like(b, device=device) for b in module.buffers()}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device=device)
        kept[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, kept)


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _to_fp32(output: Any, copy: bool) -> Any:
    def converted(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.to(dtype, copy=copy)

    return tree_map_only(Tensor, converted, output)


class Networks:
    """The networks of a run by name: `networks.critic(x)`. What stands behind a name depends on who looks."""

    def __init__(self, calls: Mapping[str, Callable[..., Any]]) -> None:
        self._calls = dict(calls)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_calls"][name]
        except KeyError:
            names = self.__dict__["_calls"]
            raise AttributeError(
                f"no network is called '{name}'{nearest(name, names)} (there are {', '.join(names)})"
            ) from None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.__getattr__(name)

    def __iter__(self) -> Any:
        return iter(self._calls)
