"""The networks of the course (C1 to C4): the shapes and the numbers of weights that their papers state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dist_train.models.alexnet import AlexNet
from dist_train.models.layers import ACTIVATIONS, NORMS, activation_of, norm_of
from dist_train.models.lenet import LeNet
from dist_train.models.mlp import MLP
from dist_train.models.resnet import ImageNetResNet, ResNet
from dist_train.models.vgg import VGG


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


# Layers by name


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_torch_functions(name: str) -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    expected = {
        "identity": lambda: x,
        "relu": lambda: x.clamp(min=0),
        "leaky_relu": lambda: torch.where(x > 0, x, 0.01 * x),
        "elu": lambda: torch.where(x > 0, x, x.exp() - 1),
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "tanh": lambda: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "sigmoid": lambda: 1 / (1 + (-x).exp()),
    }[name]()
    torch.testing.assert_close(activation_of(name)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norm_is_its_formula(name: str) -> None:
    """C6: mean 0 and variance 1 over what each norm takes together, then a scale and a shift a channel."""
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4, 64, 5, 5, dtype=torch.float64)
    norm = norm_of(name, 64).double()
    together = {
        "none": None,
        "batch": x.transpose(0, 1).reshape(64, -1),
        "layer": x.reshape(4, -1),
        "group": x.reshape(4 * 32, -1),  # 32 groups, as in the paper
    }[name]
    expected = x
    if together is not None:
        mean, variance = together.mean(1, keepdim=True), together.var(1, False, keepdim=True)
        flat = (together - mean) / (variance + 1e-5).sqrt()
        if name == "batch":
            flat = flat.reshape(64, 4, 5, 5).transpose(0, 1)
        scale, shift = torch.rand(2, 64, dtype=torch.float64)
        with torch.no_grad():
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        expected = flat.reshape(x.shape) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)


# MLP


def test_mlp_without_hidden_layers_is_linear() -> None:
    torch.manual_seed(0)
    model = MLP(12, 3, depth=0)
    image = torch.randn(5, 3, 2, 2)
    expected = image.flatten(1) @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(image), expected)
    assert count(model) == 12 * 3 + 3


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_mlp_has_the_layers_asked_for(norm: str) -> None:
    torch.manual_seed(0)
    model = MLP(8, 2, depth=3, width=5, activation="tanh", norm=norm).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = x
    for affine, normalise, _, _ in model.hidden:
        expected = normalise(expected @ affine.weight.T + affine.bias).tanh()
    torch.testing.assert_close(model(x), expected @ model.output.weight.T + model.output.bias)
    norms = 0 if norm == "none" else 3 * 2 * 5
    assert count(model) == 8 * 5 + 5 + 2 * (5 * 5 + 5) + 5 * 2 + 2 + norms


def test_xor_needs_a_hidden_layer() -> None:
    """F3: one hidden layer makes no error, and no linear model makes fewer than one in four."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    label = torch.tensor([0, 1, 1, 0])
    errors = {}
    for depth in (0, 1):
        torch.manual_seed(1)
        model = MLP(2, 2, depth=depth, width=8)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(300):
            loss = nn.functional.cross_entropy(model(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[depth] = int((model(x).argmax(1) != label).sum())
    assert errors[1] == 0
    assert errors[0] >= 1


def test_mlp_refuses() -> None:
    with pytest.raises(ValueError, match="depth counts hidden layers, 0 or more, got -1"):
        MLP(2, 2, depth=-1)
    with pytest.raises(ValueError, match="dropout"):
        MLP(2, 2, dropout=1.0)
    with pytest.raises(ValueError, match=r"norm must be one of none, batch, layer, got 'bach'"):
        MLP(2, 2, norm="bach")


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


# AlexNet


def test_alexnet_has_the_shapes_and_weights_of_the_paper() -> None:
    with torch.device("meta"):
        model = AlexNet()
        column = model.column1
        image = torch.empty(2, 3, 224, 224)
        assert column.conv1(image).shape == (2, 48, 55, 55)  # 96 over both columns
        assert column.maps2(image).shape == (2, 128, 13, 13)
        assert model(image).shape == (2, 1000)
    assert 2 * column.conv1.weight.numel() == 34_848  # 11 x 11 x 3 x 96
    # The convolutions of groups 2 and the linear layers of 4096: 60 M, as the paper says.
    assert count(model) == 60_965_224


def test_alexnet_is_the_network_with_grouped_convolutions() -> None:
    """Two columns are one network whose convolutions 2, 4 and 5 have two groups, and whose norm stays in a half."""
    torch.manual_seed(0)
    model = AlexNet(num_classes=7, image_size=64, stem="small", width=6, hidden=10).double().eval()
    a, b = model.column1, model.column2
    x = image = torch.randn(3, 3, 64, 64, dtype=torch.float64)

    def both(layer: str) -> tuple[Tensor, Tensor]:
        one, two = getattr(a, layer), getattr(b, layer)
        return torch.cat([one.weight, two.weight]), torch.cat([one.bias, two.bias])

    def normalised(x: Tensor) -> Tensor:
        halves = []
        for half in x.chunk(2, dim=1):
            padded = nn.functional.pad(half.square(), (0, 0, 0, 0, 2, 2))
            energy = sum(padded[:, i : i + half.shape[1]] for i in range(5))
            halves.append(half / (2 + 1e-4 * energy) ** 0.75)
        return torch.cat(halves, dim=1)

    pool = nn.MaxPool2d(3, 2)
    x = pool(normalised(torch.conv2d(x, *both("conv1"), stride=2, padding=2).relu()))
    x = pool(normalised(torch.conv2d(x, *both("conv2"), padding=2, groups=2).relu()))
    x = torch.conv2d(x, *both("conv3"), padding=1).relu()
    x = torch.conv2d(x, *both("conv4"), padding=1, groups=2).relu()
    x = pool(torch.conv2d(x, *both("conv5"), padding=1, groups=2).relu()).flatten(1)
    x = nn.functional.linear(x, *both("linear6")).relu()
    x = nn.functional.linear(x, *both("linear7")).relu()
    torch.testing.assert_close(model(image), model.classifier(x), rtol=1e-12, atol=1e-12)


def test_alexnet_refuses() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        AlexNet(width=16)
    with pytest.raises(ValueError, match="too small for three poolings"):
        AlexNet(image_size=28)


# VGG


@pytest.mark.parametrize(
    ("depth", "weights"),
    [(11, 132_863_336), (13, 133_047_848), (16, 138_357_544), (19, 143_667_240)],
)
def test_vgg_has_the_weights_of_the_paper(depth: int, weights: int) -> None:
    with torch.device("meta"):
        model = VGG(depth)
        assert model.stages(torch.empty(2, 3, 224, 224)).shape == (2, 512, 7, 7)
    assert count(model) == weights
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


@pytest.mark.parametrize(("size", "last"), [(28, 1), (32, 1), (64, 2)])
def test_vgg_halves_a_small_image_as_long_as_it_can(size: int, last: int) -> None:
    model = VGG(11, 1, 10, image_size=size, width=4, hidden=8, norm="batch").eval()
    image = torch.randn(2, 1, size, size)
    assert model.stages(image).shape == (2, 32, last, last)
    assert model(image).shape == (2, 10)


def test_vgg_refuses_a_depth_between() -> None:
    with pytest.raises(ValueError, match="depth must be one of 11, 13, 16, 19, got 12"):
        VGG(12)


# ResNet


@pytest.mark.parametrize(
    ("depth", "weights"),
    [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        (101, 44_549_160),
        (152, 60_192_808),
    ],
)
def test_resnet_has_the_weights_of_the_paper(depth: int, weights: int) -> None:
    with torch.device("meta"):
        model = ImageNetResNet(depth)
        last = model.stage4(model.stage3(model.stage2(model.stage1(model.stem(IMAGE)))))
        assert last.shape == (2, 512 if depth < 50 else 2048, 7, 7)
    assert count(model) == weights
    # A depth counts what stands on the longest path: not the projections.
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum("shortcut" not in name for name in layers) == depth


IMAGE = torch.empty(2, 3, 224, 224, device="meta")


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnet_for_small_images_has_the_weights_of_the_paper(depth: int, millions: float) -> None:
    """Table 6 of the paper: shortcuts without weights, so that the plain network has as many."""
    residual = ResNet(depth, in_channels=3, shortcut="identity")
    plain = ResNet(depth, in_channels=3, shortcut="none")
    assert count(residual) == count(plain)
    assert round(count(residual) / 1e6, 2) == millions


@pytest.mark.parametrize("shortcut", ["identity", "none"])
def test_resnet_block_adds_its_shortcut(shortcut: str) -> None:
    torch.manual_seed(0)
    block = ResNet(depth=8, width=4, shortcut=shortcut).stage2[0].double().eval()
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    y = block.norm2(block.conv2(block.norm1(block.conv1(x)).relu()))
    if shortcut == "identity":
        y[:, :4] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), y.relu(), rtol=1e-12, atol=1e-12)


def test_resnet_refuses() -> None:
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, 152, got 20"):
        ImageNetResNet(20)
    with pytest.raises(ValueError, match="shortcut must be one of projection, identity, none"):
        ResNet(shortcut="skip")
