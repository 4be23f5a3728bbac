"""Several members in one module: M networks of one shape, or one trunk with M heads, run as one batch by vmap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import UserError, nearest

NETWORK = "network"
"""What a stacked module calls its one copy of the network."""


class Members(nn.Module):
    """M modules of one shape as one: each weight and buffer has an axis of members before its own, (M, ...).

    It puts out (B, M, ...). In training with `own_rows` each input is (B, M, ...), of which member m sees [:, m]; else,
    and in evaluation, all members see the same (B, ...). A member's gradients are those of its own outputs alone.
    The first of the modules becomes the one that the stacked weights are put into.
    """

    def __init__(self, members: Sequence[nn.Module], own_rows: bool) -> None:
        super().__init__()
        self.count, self.own_rows = len(members), own_rows
        self.network = members[0]
        parameters, buffers = torch.func.stack_module_state(list(members))
        for name, stacked in {**parameters, **buffers}.items():
            path, _, leaf = name.rpartition(".")
            if name in parameters:
                stacked = nn.Parameter(stacked.detach(), requires_grad=stacked.requires_grad)
            setattr(self.network.get_submodule(path), leaf, stacked)

    def forward(self, *inputs: Tensor) -> Any:
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        axes = [1 if self.own_rows and self.training else None] * len(inputs)
        # each member draws for itself; as one tensor, so not what a run of its own would draw
        run = torch.func.vmap(self._one, (0, *axes), out_dims=1, randomness="different")
        return run(tensors, *inputs)

    def _one(self, tensors: dict[str, Tensor], *inputs: Tensor) -> Any:
        return torch.func.functional_call(self.network, tensors, inputs)


def stacked(members: Sequence[nn.Module], heads: str | None, where: str) -> nn.Module:
    """All members as one module, or where `heads` names a layer, the first with that layer of each.

    Raises UserError for a layer that there is not, and for members that cannot be stacked.
    """
    try:
        if heads is None:
            return Members(members, own_rows=True)
        layers = [layer_called(member, heads, where) for member in members]
        path, _, leaf = heads.rpartition(".")
        setattr(members[0].get_submodule(path), leaf, Members(layers, own_rows=False))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{where}: these networks cannot be stacked: {error}") from error
    return members[0]


def layer_called(network: nn.Module, name: str, where: str) -> nn.Module:
    layers = dict(network.named_modules())
    if name not in layers or not name:
        names = [layer for layer in layers if layer]
        raise UserError(
            f"{where}.heads: got '{name}', which is no layer of the network{nearest(name, names)}"
            f" (the last are {', '.join(names[-3:])})"
        )
    return layers[name]


def stacked_names(networks: Mapping[str, nn.Module]) -> frozenset[str]:
    """The parameters that have an axis of members before their own, as NETWORK.NAME."""
    return frozenset(
        f"{network}.{path}.{name}" if path else f"{network}.{name}"
        for network, module in networks.items()
        for path, inner in module.named_modules()
        if isinstance(inner, Members)
        for name, _ in inner.named_parameters()
    )


def member_state(network: nn.Module, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """What of a network's state is that of member `number`, by the names that it has as a network of its own."""
    prefixes = [
        f"{path}.{NETWORK}." if path else f"{NETWORK}."
        for path, inner in network.named_modules()
        if isinstance(inner, Members)
    ]
    return dict(_own(name, tensor, prefixes, number) for name, tensor in state.items())


def _own(name: str, tensor: Tensor, prefixes: Iterable[str], number: int) -> tuple[str, Tensor]:
    for prefix in prefixes:
        if name.startswith(prefix):
            return prefix.removesuffix(f"{NETWORK}.") + name.removeprefix(prefix), tensor[number]
    return name, tensor
