"""What several model files share: activations and normalisations by name, as recipes choose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

Key = TypeVar("Key")
Made = TypeVar("Made")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    # Over a micro-batch, whose size is the recipe's: groups that do not depend on the world size.
    "batch": nn.BatchNorm2d,  # Ioffe and Szegedy 2015, arXiv:1502.03167
    "layer": lambda channels: nn.GroupNorm(1, channels),  # Ba et al. 2016, arXiv:1607.06450
    "group": lambda channels: nn.GroupNorm(groups_of(channels), channels),  # arXiv:1803.08494
}
"""Over the maps of a convolution (B, C, H, W), each with a scale and a shift a channel."""


def groups_of(channels: int) -> int:
    """The largest of 32, 16, 8, ... that divides the channels: 32 is the paper's."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def chosen(table: Mapping[Key, Made], name: Key, what: str) -> Made:
    """The entry of a table. ValueError lists the names there are."""
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(map(str, table))}, got {name!r}")
    return table[name]


def activation_of(name: str) -> nn.Module:
    """A new activation by its name."""
    return chosen(ACTIVATIONS, name, "activation")()


def norm_of(name: str, channels: int) -> nn.Module:
    """A new normalisation of `channels` maps by its name."""
    return chosen(NORMS, name, "norm")(channels)


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, bias: bool = False
) -> nn.Conv2d:
    """A same-padded convolution; a norm that follows has a bias of its own."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
