"""Optimisers of torch, in their fused form, under the names that recipes use.

A part takes parameter groups and the recipe's arguments and returns a `torch.optim.Optimizer`.
No weight decays unless the recipe says so, with `adamw` neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.errors import UserError

Groups = list[dict[str, Any]]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch has one kernel for the whole update of a tensor."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float = 0.0
) -> Groups:
    """Split parameters into those that decay and those with less than 2 axes, which do not.

    The latter are norms and biases. Each group is `{"params", "names", "weight_decay"}`, in the
    order given; an empty group is left out.
    """
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    if not weight_decay:
        named = list(named_parameters)
        return [
            {"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": 0.0}
        ]
    undecayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in named_parameters:
        group = decayed if parameter.ndim >= 2 else undecayed
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decayed, undecayed) if group["params"]]


def sgd(
    groups: Groups,
    learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum: v = momentum v + g, w = w - learning_rate v.

    With `nesterov` w moves by g + momentum v instead of v. `weight_decay` adds weight_decay w to g,
    in groups that have no decay of their own.
    """
    return torch.optim.SGD(
        groups,
        lr=learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        fused=fused(groups),
    )


def adam(
    groups: Groups,
    learning_rate: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adam with bias correction (Kingma and Ba 2015, arXiv:1412.6980).

    `weight_decay` adds weight_decay w to g, in groups that have no decay of their own.
    """
    return torch.optim.Adam(
        groups,
        lr=learning_rate,
        betas=pair(betas),
        eps=eps,
        weight_decay=weight_decay,
        fused=fused(groups),
    )


def adamw(
    groups: Groups,
    learning_rate: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adam with decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    w shrinks by learning_rate weight_decay w, in groups that have no decay of their own.
    """
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=pair(betas),
        eps=eps,
        weight_decay=weight_decay,
        fused=fused(groups),
    )


def pair(betas: Sequence[float]) -> tuple[float, float]:
    """Recipes give betas as a list; torch wants a tuple of two."""
    if len(betas) != 2:
        raise UserError(f"betas must be two numbers, got {list(betas)}")
    return (betas[0], betas[1])


def fused(groups: Groups) -> bool:
    """Whether every parameter of the groups is where torch has fused kernels for it."""
    return all(
        parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()
        for group in groups
        for parameter in group["params"]
    )
