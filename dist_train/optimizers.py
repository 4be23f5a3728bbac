"""Optimisers under the names that recipes use, in their fused form where torch has one.

A part takes parameter groups and the recipe's arguments and returns a `torch.optim.Optimizer`.
No weight decays unless the recipe says so, with `adamw` neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_train.errors import UserError, nearest
from dist_train.parameter_groups import Groups, matches, within_network

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch has one kernel for the whole update of a tensor."""


def sgd(
    groups: Groups,
    learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum: v = momentum v + g, w = w - learning_rate v.

    With `nesterov` w moves by g + momentum v instead of v. `weight_decay` adds weight_decay w to g, in groups that have
    no decay of their own: the gradient of a Gaussian prior over w of variance 1 / weight_decay, beside a mean loss.
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


def rmsprop(
    groups: Groups,
    learning_rate: float,
    decay: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """RMSProp (Hinton 2012, lecture 6e): s = decay s + (1 - decay) g^2, w = w - learning_rate g / (sqrt(s) + eps).

    With `momentum` v = momentum v + g / (sqrt(s) + eps) takes the place of that quotient.
    """
    return torch.optim.RMSprop(
        groups,
        lr=learning_rate,
        alpha=decay,
        eps=eps,
        momentum=momentum,
        weight_decay=weight_decay,
        foreach=True,
    )


class AdaGrad(torch.optim.Optimizer):
    """See `adagrad`. Torch's own makes its state when it is built, from whole parameters; ZeRO has only flat slices,
    for which DeepSpeed would replace it by a new one without our groups."""

    def __init__(self, groups: Groups, lr: float, eps: float, weight_decay: float) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise UserError(
                f"learning_rate, eps and weight_decay must be 0 or more, got {lr}, {eps}, {weight_decay}"
            )
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients: Any = [p.grad for p in weights]
            if not weights:
                continue
            sums = [self.state[p].setdefault("sum", torch.zeros_like(p)) for p in weights]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_addcmul_(sums, gradients, gradients)
            scale = torch._foreach_sqrt(sums)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_addcdiv_(weights, gradients, scale, value=-group["lr"])


def adagrad(
    groups: Groups, learning_rate: float, eps: float = 1e-10, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdaGrad (Duchi et al. 2011): s = s + g^2, w = w - learning_rate g / (sqrt(s) + eps)."""
    return AdaGrad(groups, learning_rate, eps, weight_decay)


def adafactor(
    groups: Groups,
    learning_rate: float = 0.01,
    beta2_decay: float = -0.8,
    eps: float = 1e-3,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): Adam's second moments as a row and a column a matrix.

    The step of a tensor is max(eps, RMS(w)) min(learning_rate, 1 / sqrt(t)), its update is scaled down to RMS `clip`.
    It needs each matrix whole, so it is refused under ZeRO. Torch reads a norm back to the host for each tensor.
    """
    return torch.optim.Adafactor(
        groups,
        lr=learning_rate,
        beta2_decay=beta2_decay,
        eps=(None, eps),
        d=clip,
        weight_decay=weight_decay,
        foreach=False,  # its foreach form sums in an order of its own
    )


class Muon(torch.optim.Optimizer):
    """See `muon`. Two optimisers of torch behind one: they share this one's groups and state."""

    def __init__(
        self, groups: Groups, adamw: Sequence[str], options: Mapping[str, Any], **adam: Any
    ) -> None:
        names = [name for group in groups for name in group["names"]]
        for pattern in adamw:
            if not any(matches(name, pattern) for name in names):
                near = nearest(pattern, [within_network(name) for name in names])
                raise UserError(f"adamw: '{pattern}' matches no parameter{near}")
        matrices: Groups = []
        rest: Groups = []
        for group in groups:
            pairs = list(zip(group["names"], group["params"], strict=True))
            by_muon = {
                name
                for name, parameter in pairs
                if parameter.ndim == 2 and not any(matches(name, pattern) for pattern in adamw)
            }
            for kind, chosen in (
                (matrices, [pair for pair in pairs if pair[0] in by_muon]),
                (rest, [pair for pair in pairs if pair[0] not in by_muon]),
            ):
                if chosen:
                    kind.append(
                        group | {"names": [n for n, _ in chosen], "params": [p for _, p in chosen]}
                    )
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, **options))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, fused=fused(rest), **adam))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()


def muon(
    groups: Groups,
    learning_rate: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adamw: list[str] | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Muon (Jordan 2024) for matrices: momentum, then the nearest orthogonal matrix by Newton-Schulz; else AdamW.

    A matrix's update is scaled by 0.2 sqrt(max(rows, columns)): its RMS is that of AdamW's, and one learning rate
    serves both (Liu et al. 2025, arXiv:2502.16982, section 2.2). Decay is decoupled. What has not exactly 2 axes goes
    to AdamW, and so do embeddings and the output layer where `adamw` names them: patterns of parameter names, like
    `["*embedding*", "head.*"]`. It needs each matrix whole, so it is refused under ZeRO.
    """
    return Muon(
        groups,
        adamw or [],
        {
            "lr": learning_rate,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr_fn": "match_rms_adamw",
        },
        lr=learning_rate,
        betas=pair(betas),
        eps=eps,
        weight_decay=weight_decay,
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
