"""Which parameters are updated alike: decay, the l1 term, scaled rates, frozen layers, by patterns of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.errors import UserError, nearest

if TYPE_CHECKING:
    from dist_train.recipe.sections import GroupSettings

Groups = list[dict[str, Any]]

ANY = "*"
"""The name of a parameter that stands for whatever a network may have, when a recipe is checked without one."""


def assign(
    networks: Mapping[str, nn.Module], settings: GroupSettings, where: str = "optimizer"
) -> dict[str, int]:
    """{parameter, as NETWORK.NAME: the first of `settings.groups` that matches it}; frozen ones are frozen here.

    A pattern is tried on the name within the network and on NETWORK.NAME; `*` also matches dots. Raises UserError for a
    pattern that takes no parameter, and when no parameter is left to train.
    """
    parameters = {
        f"{network}.{name}": parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
    }
    rule_of: dict[str, int] = {}
    for name, parameter in parameters.items():
        for index, group in enumerate(settings.groups):
            if matches(name, group.match):
                rule_of[name] = index
                if group.frozen:
                    parameter.requires_grad_(False)
                break
    for index, group in enumerate(settings.groups):
        if index in rule_of.values():
            continue
        found = f"no parameter{nearest(group.match, [within_network(name) for name in parameters])}"
        if any(matches(name, group.match) for name in parameters):
            found = "only what earlier groups have taken: the first that matches wins"
        raise UserError(f"{where}.groups.{index}.match: got '{group.match}', which matches {found}")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"{where}.groups: every parameter is frozen, expected one to train")
    return rule_of


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern like `stem.*` is the name NETWORK.NAME of a parameter, or its part within the network."""
    return name == ANY or fnmatchcase(name, pattern) or fnmatchcase(within_network(name), pattern)


def within_network(name: str) -> str:
    return name.partition(".")[2]


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float = 0.0,
    settings: GroupSettings | None = None,
    rule_of: Mapping[str, int] | None = None,
    stacked: Collection[str] = (),
) -> Groups:
    """Parameters that are updated alike, as `{"params", "names", "weight_decay", "l1", "scale"}`.

    Parameters with less than 2 axes (norms and biases) neither decay nor shrink, unless a group of the recipe that
    matches them says so. First come those that no group of the recipe matches, then its groups in their order; in each
    those that decay come first. An empty group is left out.

    Args:
        settings: what the recipe says of groups. rule_of: which parameter is in which, from `assign`.
        stacked: those that have an axis of members before their own.
    """
    made: dict[tuple[int, float, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        rule = (rule_of or {}).get(name, -1)
        group = settings.groups[rule] if settings and rule >= 0 else None
        whole = parameter.ndim - (name in stacked) >= 2
        decay = weight_decay if whole else 0.0
        l1 = settings.l1 if settings and whole else 0.0
        if group is not None:
            decay = decay if group.weight_decay is None else group.weight_decay
            l1 = l1 if group.l1 is None else group.l1
        entry = made.setdefault(
            (rule, -decay, -l1),
            {
                "params": [],
                "names": [],
                "weight_decay": decay,
                "l1": l1,
                "scale": 1.0 if group is None else group.learning_rate_scale,
            },
        )
        entry["params"].append(parameter)
        entry["names"].append(name)
    return [made[key] for key in sorted(made)]


def heed_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make any optimiser heed its groups' `scale` and `l1`."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("scale", 1.0)
    if any(group.get("l1") for group in optimizer.param_groups):
        optimizer.register_step_post_hook(soft_threshold)
    return optimizer


@torch.no_grad()
def soft_threshold(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """w <- sign(w) max(|w| - learning_rate l1, 0): the proximal step of l1 |w|, which makes weights exactly 0.

    With `sgd` the two steps together are proximal gradient descent, whose fixed point is the maximum of the posterior
    under a Laplace prior. With adaptive optimisers the term is decoupled from the gradient, as AdamW's decay is. It is
    done once an update, whatever the batch and the ranks, and elementwise, so that ZeRO's slices are right.
    """
    for group in optimizer.param_groups:
        bound = group["lr"] * group.get("l1", 0.0)
        for parameter in group["params"] if bound else []:
            parameter.sub_(parameter.clamp(-bound, bound))
