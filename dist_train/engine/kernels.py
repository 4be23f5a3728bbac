"""The fused kernels of torch's optimisers, called without what torch.optim does around them.

torch.optim looks up parameters, states and devices anew at every step and opens a profiler's record around it: on a
CPU that takes longer than to update a small network. Here they are looked up once, and the kernels of Adam, AdamW and
SGD are called as torch.optim calls them, with the same numbers (docs/decisions/0054).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Kernel = Callable[[Tensor | None], None]
"""Updates some parameters from their gradients, which it divides by a 0-d tensor (None: by 1) as it reads them."""


def kernels_of(optimizer: torch.optim.Optimizer) -> list[Kernel]:
    """The kernels that together update all parameters of an optimiser whose state exists; none for one that has none.

    They need a gradient of every parameter.
    """
    if type(optimizer) not in _KERNELS or not optimizer.defaults.get("fused"):
        return []
    make = _KERNELS[type(optimizer)]
    return [
        make(group, part, optimizer)
        for group in optimizer.param_groups
        for part in _by_device(group["params"])
    ]


def _by_device(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(parts.values())


def _gradients(parameters: list[nn.Parameter]) -> Any:
    return [p.grad for p in parameters]


def _adam(
    group: dict[str, Any], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Kernel:
    states = [optimizer.state[p] for p in parameters]
    weights, device = [p.detach() for p in parameters], parameters[0].device
    averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    largest = [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else []
    # one tensor holds what each parameter counts: on a CPU each would be added to on its own
    count = torch.stack([s["step"] for s in states])
    counts = list(count.unbind())
    for state, own in zip(states, counts, strict=True):
        state["step"] = own
    function = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_

    def kernel(divisor: Tensor | None) -> None:
        count.add_(1)
        beta1, beta2 = group["betas"]
        function(
            weights,
            _gradients(parameters),
            averages,
            squares,
            largest,
            counts,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=None if divisor is None else divisor.to(device, non_blocking=True),
        )

    return kernel


def _sgd(
    group: dict[str, Any], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Kernel:
    weights, device = [p.detach() for p in parameters], parameters[0].device
    moving = bool(group["momentum"])
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters] if moving else []

    def kernel(divisor: Tensor | None) -> None:
        torch._fused_sgd_(
            weights,
            _gradients(parameters),
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            grad_scale=None if divisor is None else divisor.to(device, non_blocking=True),
        )

    return kernel


_KERNELS: dict[type, Callable[..., Kernel]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
}
