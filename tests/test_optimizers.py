"""Optimisers against their written update rules, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import UserError
from dist_train.optimizers import adam, adamw, sgd
from dist_train.parameter_groups import parameter_groups

RATE = 0.05


def five_steps(optimizer_of, rule, **arguments) -> None:
    """Give an optimiser and `rule(weight, gradient, state, step) -> weight` the same gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(37, 3, generator=generator, dtype=torch.float64)

    ours = nn.Parameter(draw())
    expected = ours.detach().clone()
    state: dict[str, Tensor] = {}
    optimizer = optimizer_of([{"params": [ours]}], RATE, **arguments)
    for step in range(1, 6):
        ours.grad = draw()
        expected = rule(expected, ours.grad.clone(), state, step)
        optimizer.step()
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * (g + decay * w)

    five_steps(sgd, rule, weight_decay=decay)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(nesterov: bool) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        g = g + 0.1 * w
        state["v"] = 0.9 * state.get("v", torch.zeros_like(w)) + g
        return w - RATE * (g + 0.9 * state["v"] if nesterov else state["v"])

    five_steps(sgd, rule, momentum=0.9, nesterov=nesterov, weight_decay=0.1)


def adam_step(
    g: Tensor, state: dict[str, Tensor], step: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    state["m"] = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", torch.zeros_like(g)) + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
    return m / (v.sqrt() + eps)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_adds_decay_to_the_gradient(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * adam_step(g + decay * w, state, step, 0.5, 0.9, 1e-6)

    five_steps(adam, rule, betas=[0.5, 0.9], eps=1e-6, weight_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_decays_beside_the_gradient(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * decay * w - RATE * adam_step(g, state, step, 0.9, 0.999, 1e-8)

    five_steps(adamw, rule, weight_decay=decay)


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_the_kernel_is_fused(make) -> None:
    optimizer = make([{"params": [nn.Parameter(torch.zeros(2))]}], 0.1)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["weight_decay"] == 0.0


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_a_device_without_fused_kernels_gets_the_plain_ones(make) -> None:
    optimizer = make([{"params": [nn.Parameter(torch.zeros(2, device="meta"))]}], 0.1)
    assert not optimizer.defaults["fused"]


def test_parameter_groups_spare_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [group["names"] for group in groups] == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    named = dict(model.named_parameters())
    for group in groups:
        assert all(
            named[name] is p for name, p in zip(group["names"], group["params"], strict=True)
        )
    optimizer = adamw(groups, 0.1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["names"] == ["0.weight", "3.weight"]


def test_parameter_groups_leave_out_the_empty() -> None:
    norm = nn.LayerNorm(4)
    groups = parameter_groups(norm.named_parameters(), 0.1)
    assert [group["names"] for group in groups] == [["weight", "bias"]]
    assert parameter_groups([], 0.1) == []


def test_betas_are_two() -> None:
    with pytest.raises(UserError, match="betas must be two numbers"):
        adam([{"params": [nn.Parameter(torch.zeros(1))]}], 0.1, betas=[0.9])
