"""An engine's update against the `step` of torch.optim: the same bits, without its lookups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.engine.base import materialise
from dist_train.engine.update import Update

OPTIMIZERS: dict[str, Any] = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.2, fused=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.2, fused=True),
    "nesterov": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, nesterov=True, fused=True
    ),
    "plain": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
}
SHAPES = ((5, 3), (3,), (4, 5), (4,))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(DEVICE)


def optimizer_of(name: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(drawn(shape, generator)) for shape in SHAPES]
    groups = [{"params": weights[::2]}, {"params": weights[1::2], "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[name](groups)
    materialise(optimizer)
    return optimizer


def weights_of(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in weights_of(optimizer):
        parameter.grad = drawn(tuple(parameter.shape), generator)


def state_of(optimizer: Any) -> list[Tensor]:
    states = [optimizer.state[p] for p in weights_of(optimizer)]
    kept = [v.clone() for s in states for v in s.values() if isinstance(v, Tensor)]
    return [p.detach().clone() for p in weights_of(optimizer)] + kept


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_those_of_torchs_own_step(name: str) -> None:
    """Over steps with other rates, momenta and divisors, some of them with a hook or under a profiler."""
    ours, theirs = optimizer_of(name), optimizer_of(name)
    update = Update(ours)
    for step in range(8):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
                if "betas" in group:
                    group["betas"] = (0.9 - 0.1 * step, 0.99)
        fused = name not in ("plain", "rmsprop")
        divisor = torch.tensor(1.0 + step, device=DEVICE) if fused and step % 3 else None
        gradients = [p.grad for p in weights_of(ours)]
        theirs.grad_scale = divisor
        theirs.step()
        if step in (3, 6):
            hook = ours.register_step_post_hook(lambda *_: None)
            update(gradients, divisor, None)
            hook.remove()
        elif step == 5:
            with torch.autograd.profiler.profile() as profile:
                update(gradients, divisor, None)
            assert any("Optimizer.step#" in event.key for event in profile.key_averages())
        else:
            update(gradients, divisor, None)
        assert all(map(torch.equal, state_of(ours), state_of(theirs))), step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_one_kernel_a_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of(name)
    update = Update(optimizer)
    give_gradients(optimizer, 0)
    own: list[int] = []
    step = type(optimizer).step
    monkeypatch.setattr(optimizer, "step", lambda: own.append(1) or step(optimizer))
    update([p.grad for p in weights_of(optimizer)], None, None)
    assert len(own) == (name in ("plain", "rmsprop"))


def test_a_hook_is_heeded() -> None:
    optimizer = optimizer_of("adamw")
    update, called = Update(optimizer), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    give_gradients(optimizer, 0)
    update([p.grad for p in weights_of(optimizer)], None, None)
    assert called == ["before"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", (None, 0.5))
def test_gradients_are_divided_then_clipped(name: str, value: float | None) -> None:
    """By a divisor that the kernel applies, or one that is applied before it; torch's step gets them so already."""
    ours, theirs = optimizer_of(name), optimizer_of(name)
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 0)
    for parameter in weights_of(theirs):
        parameter.grad.div_(4.0)  # a power of 2, so that no order of rounding shows
        if value is not None:
            parameter.grad.clamp_(-value, value)
    Update(ours)([p.grad for p in weights_of(ours)], torch.tensor(4.0, device=DEVICE), value)
    theirs.step()
    exact = DEVICE == "cpu"  # a GPU's kernel rounds once where it divides itself
    for one, other in zip(state_of(ours), state_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-6, atol=0)


def test_the_divisor_is_that_of_clip_grad_norm() -> None:
    optimizer = optimizer_of("adamw")
    update = Update(optimizer)
    for step, bound in enumerate((0.5, 0.5, 100.0, 2.0)):
        give_gradients(optimizer, step)
        before = [p.grad.clone() for p in weights_of(optimizer)]
        norm = torch.nn.utils.clip_grad_norm_(weights_of(optimizer), bound)
        divisor = update.divisor_of(norm, None, bound)
        assert divisor is not None
        for gradient, parameter in zip(before, weights_of(optimizer), strict=True):
            torch.testing.assert_close(gradient / divisor, parameter.grad, rtol=3e-7, atol=0)
        scaled = update.divisor_of(norm, 8.0, bound)
        assert torch.equal(scaled, divisor * 8)
    assert update.divisor_of(norm, None, None) is None


@pytest.mark.parametrize("value", (None, 0.5))
def test_a_rank_that_holds_nothing_updates_nothing(value: float | None) -> None:
    optimizer = torch.optim.SGD([{"params": []}], lr=0.1)
    Update(optimizer)([], torch.tensor(2.0, device=DEVICE), value)
    assert not optimizer.state


def test_a_parameter_without_a_gradient_stays() -> None:
    ours, theirs = optimizer_of("adamw"), optimizer_of("adamw")
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 0)
        weights_of(optimizer)[1].grad = None
    Update(ours)([p.grad for p in weights_of(ours) if p.grad is not None], None, None)
    theirs.step()
    assert all(map(torch.equal, state_of(ours), state_of(theirs)))
