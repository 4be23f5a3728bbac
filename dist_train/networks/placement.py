"""Parts of a network on further devices of their rank, as AlexNet's columns were in 2012: where, not what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dist_train.errors import UserError, nearest

DRAWING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.RReLU)


def check(network: nn.Module, placement: Mapping[str, int]) -> None:
    """UserError for a part that the network does not have or that cannot stand elsewhere."""
    names = [name for name, _ in network.named_modules() if name]
    for name in placement:
        where = f"placement.{name}"
        if name not in names:
            raise UserError(f"{where}: the network has no such part{nearest(name, names)}")
        inside = [other for other in placement if other.startswith(f"{name}.")]
        if inside:
            raise UserError(f"{where}: holds {inside[0]}, which has a device of its own")
        for module in network.get_submodule(name).modules():
            if isinstance(module, DRAWING):
                raise UserError(
                    f"{where}: holds {type(module).__name__}, whose draws would be those of another device"
                )
            own = next((name for name, _ in module.named_parameters(recurse=False)), None)
            if own is not None and next(module.children(), None) is not None:
                raise UserError(
                    f"{where}: holds the weight {own} beside layers, which no hook brings"
                )
            if next(module.buffers(recurse=False), None) is not None:
                raise UserError(f"{where}: holds {type(module).__name__}, which keeps statistics")


def place(network: nn.Module, placement: Mapping[str, int], devices: Sequence[str]) -> None:
    """Move each layer to its device, and have it bring there what it is called with.

    Args:
        placement: {part: number of its device}; what is in no part is on device 0, and the network's output with it.
    """
    for layer, number in layers(network, placement):
        layer.to(devices[number])
        layer.register_forward_pre_hook(Bring(devices[number]))


def layers(network: nn.Module, placement: Mapping[str, int]) -> Iterator[tuple[nn.Module, int]]:
    """Every module that holds no others, and the number of its device."""
    for name, module in network.named_modules():
        if next(module.children(), None) is None:
            found = (n for part, n in placement.items() if f"{name}.".startswith(f"{part}."))
            yield module, next(found, 0)


class Bring:
    """A hook that moves a layer's arguments to its device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for value in inputs
        )
