"""What several model files share: activations and normalisations by name, as recipes choose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

Factory = Callable[..., nn.Module]

ACTIVATIONS: dict[str, Factory] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def activation_of(name: str) -> nn.Module:
    """A new activation by its name. ValueError lists the names there are."""
    return _choice(ACTIVATIONS, name, "activation")()


def _choice(table: Mapping[str, Factory], name: str, what: str) -> Factory:
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
