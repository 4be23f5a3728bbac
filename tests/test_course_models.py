"""The networks of the course: the shapes and the numbers of weights that their papers state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dist_train.models.lenet import LeNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """The output shape of every child, without the batch."""
    found: dict[str, tuple[int, ...]] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        found.setdefault(names[module], tuple(out.shape[1:]))

    names = {child: name for name, child in model.named_children()}
    for child in names:
        child.register_forward_hook(note)
    model(image)
    return found


# LeNet-5


@pytest.mark.parametrize("size", [28, 32])
def test_lenet_has_the_shapes_and_weights_of_the_paper(size: int) -> None:
    model = LeNet(image_size=size)
    assert shapes(model, torch.randn(2, 1, size, size)) == {
        "conv1": (6, 28, 28),
        "conv2": (16, 10, 10),
        "linear1": (120,),
        "linear2": (84,),
        "classifier": (10,),
        "activation": (6, 28, 28),
    }
    # C1 156 and C5 48,120 and F6 10,164 of the paper; C3 is fully connected here.
    sizes = [count(child) for child in model.children()]
    assert sizes == [156, 16 * 150 + 16, 48_120, 10_164, 850, 0]


def test_lenet_starts_at_the_loss_of_a_guess() -> None:
    torch.manual_seed(0)
    logits = LeNet()(torch.randn(64, 1, 28, 28))
    loss = nn.functional.cross_entropy(logits, torch.arange(64) % 10)
    assert abs(loss.item() - math.log(10)) < 0.05


def test_lenet_refuses() -> None:
    with pytest.raises(ValueError, match="at most 32, got 33"):
        LeNet(image_size=33)
    with pytest.raises(ValueError, match=r"activation must be one of .*tanh.*got 'relo'"):
        LeNet(activation="relo")
