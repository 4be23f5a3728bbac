"""The models against torch.nn, closed forms and their own promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dist_train.models.gan import ConvCritic, ConvGenerator
from dist_train.models.resnet import ResNet
from dist_train.models.transformer import Transformer


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ResNet


def test_resnet_20_has_the_weights_of_the_paper() -> None:
    # He et al. 2015, table 6: 0.27 M with identity shortcuts; two projections add their weights.
    w = 16
    convolutions = 9 * (3 * w + 6 * w * w + (2 + 4 * 5) * w * w + (8 + 16 * 5) * w * w)
    norms = 2 * (7 * w + 6 * 2 * w + 6 * 4 * w)
    projections = 2 * w * w + 8 * w * w + 2 * (2 * w + 4 * w)
    classifier = 4 * w * 10 + 10
    model = ResNet(depth=20, width=w, in_channels=3, num_classes=10)
    assert count(model) == convolutions + norms + projections + classifier


@pytest.mark.parametrize("size", [28, 32])
def test_resnet_shapes(size: int) -> None:
    torch.manual_seed(0)
    model = ResNet(depth=8, width=4, in_channels=2, num_classes=7).eval()
    image = torch.randn(3, 2, size, size)
    logits = model(image)
    assert logits.shape == (3, 7)
    last = model.to(memory_format=torch.channels_last)(
        image.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(last, logits, rtol=1e-5, atol=1e-6)


def test_resnet_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = ResNet(depth=8, width=4).stage2[0].double().train()
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)

    def normalise(y: Tensor) -> Tensor:
        mean = y.mean((0, 2, 3), keepdim=True)
        return (y - mean) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    first = torch.conv2d(x, block.conv1.weight, stride=2, padding=1)
    second = torch.conv2d(normalise(first).relu(), block.conv2.weight, padding=1)
    shortcut = torch.conv2d(x, block.shortcut[0].weight, stride=2)
    expected = (normalise(second) + normalise(shortcut)).relu()
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_resnet_starts_at_the_loss_of_a_guess() -> None:
    torch.manual_seed(0)
    model = ResNet(depth=14, num_classes=10)
    loss = nn.functional.cross_entropy(model(torch.randn(64, 1, 28, 28)), torch.arange(64) % 10)
    assert abs(loss.item() - math.log(10)) < 0.1


@pytest.mark.parametrize("depth", [2, 7, 10, 18])
def test_resnet_refuses_a_depth_between(depth: int) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        ResNet(depth=depth)


# Transformer


def small_transformer(**changes: float) -> Transformer:
    torch.manual_seed(0)
    arguments = {"vocab_size": 50, "dim": 32, "depth": 3, "num_heads": 4, "max_length": 16}
    return Transformer(**(arguments | changes))  # type: ignore[arg-type]


def reference_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """The same weights in torch's own encoder layers under a causal mask."""
    length = tokens.shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=model.norm.weight.dtype)
    x = model.embedding(tokens) + model.position(torch.arange(length))
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        ).to(x.dtype)
        theirs = {
            "self_attn.in_proj": block.attention.query_key_value,
            "self_attn.out_proj.": block.attention.projection,
            "linear1.": block.expand,
            "linear2.": block.contract,
            "norm1.": block.norm1,
            "norm2.": block.norm2,
        }
        layer.load_state_dict(
            {
                f"{name}{'' if name.endswith('.') else '_'}{kind}": getattr(ours, kind)
                for name, ours in theirs.items()
                for kind in ("weight", "bias")
            }
        )
        x = layer(x, src_mask=mask)
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_transformer_equals_torch_encoder_layers(dtype: torch.dtype, tolerance: float) -> None:
    model = small_transformer().to(dtype)
    tokens = torch.randint(0, 50, (2, 12))
    expected = reference_logits(model, tokens)
    assert model(tokens).shape == (2, 12, 50)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=tolerance)


def test_transformer_gradients_equal_torch_encoder_layers() -> None:
    model = small_transformer().double()
    tokens = torch.randint(0, 50, (2, 12))
    embedding = model.embedding.weight
    (ours,) = torch.autograd.grad(model(tokens).square().sum(), embedding)
    (theirs,) = torch.autograd.grad(reference_logits(model, tokens).square().sum(), embedding)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_transformer_sees_no_later_token() -> None:
    model = small_transformer()
    tokens = torch.randint(0, 50, (1, 16))
    before = model(tokens)
    for position in (0, 7, 15):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 50
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-4)


def test_transformer_counts_the_tied_weight_once() -> None:
    model = small_transformer()
    v, c, depth, t = 50, 32, 3, 16
    block = 4 * c * c + 4 * c + 8 * c * c + 5 * c + 4 * c
    assert count(model) == v * c + t * c + depth * block + 2 * c
    shapes = [name for name, p in model.named_parameters() if p.shape == (v, c)]
    assert shapes == ["embedding.weight"]
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_transformer_initial_scales_follow_the_width() -> None:
    torch.manual_seed(0)
    model = Transformer(vocab_size=256, dim=128, depth=8)
    block = model.blocks[3]
    scale = 0.5 / math.sqrt(128)
    for weight, std in [
        (model.embedding.weight, scale),
        (block.attention.query_key_value.weight, scale),
        (block.attention.projection.weight, scale / math.sqrt(2 * 8)),
        (block.contract.weight, scale / math.sqrt(2 * 8)),
    ]:
        assert abs(weight.std().item() / std - 1) < 0.03
    logits = model(torch.randint(0, 256, (4, 64)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 256, (256,)))
    # Logits of standard deviation 0.5 add half their variance to the loss of a guess.
    assert abs(loss.item() - math.log(256) - 0.125) < 0.1


def test_transformer_drops_only_in_training() -> None:
    model = small_transformer(dropout=0.5)
    plain = small_transformer()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 12))
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model(tokens))
    assert torch.equal(*draws)


def test_transformer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        Transformer(10, dim=10, num_heads=4)
    with pytest.raises(ValueError, match="dropout"):
        Transformer(10, dropout=1.0)
    with pytest.raises(ValueError, match="max_length 16"):
        small_transformer()(torch.zeros(1, 17, dtype=torch.int64))


# GAN


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_gan_shapes(size: int, channels: int) -> None:
    torch.manual_seed(0)
    generator = ConvGenerator(latent_dim=8, width=4, channels=channels, image_size=size)
    critic = ConvCritic(width=4, channels=channels, image_size=size)
    image = generator(torch.randn(5, 8))
    assert image.shape == (5, channels, size, size)
    assert image.abs().max() <= 1
    assert critic(image).shape == (5,)


def test_gan_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    generator, critic = ConvGenerator(width=4).double(), ConvCritic(width=4).double()
    latent = torch.randn(6, 64, dtype=torch.float64)
    image = generator(latent)
    torch.testing.assert_close(generator(latent[2:3]), image[2:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(critic(image[2:3]), critic(image)[2:3], rtol=0, atol=1e-12)


def test_gan_signal_keeps_its_scale() -> None:
    torch.manual_seed(0)
    generator, critic = ConvGenerator(), ConvCritic()
    scales: list[float] = []
    for module in [generator.project, generator.up1, generator.up2, critic.hidden, critic.score]:
        module.register_forward_pre_hook(lambda m, given: scales.append(given[0].square().mean()))
    critic(generator(torch.randn(256, 64)))
    assert all(0.2 < scale < 2.5 for scale in scales), scales


def test_gradient_penalty_equals_finite_differences() -> None:
    torch.manual_seed(0)
    critic = ConvCritic(width=2, image_size=8).double()
    image = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    weight = critic.down2.weight

    def penalty() -> Tensor:
        x = image.clone().requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    (gradient,) = torch.autograd.grad(penalty(), weight)
    step = torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(1e-6 * step)
    above = penalty().detach()
    with torch.no_grad():
        weight.sub_(2e-6 * step)
    below = penalty().detach()
    torch.testing.assert_close((above - below) / 2e-6, (gradient * step).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [0, 30])
def test_gan_refuses_a_size_that_two_halvings_do_not_divide(size: int) -> None:
    for model in (ConvGenerator, ConvCritic):
        with pytest.raises(ValueError, match="multiple of 4"):
            model(image_size=size)
