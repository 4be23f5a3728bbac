"""BigGAN: conditional norms, attention, projection and orthogonal term against their formulas, alone and on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import curriculum
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.models.biggan import (
    BigGANDiscriminator,
    BigGANGenerator,
    ConditionalBatchNorm2d,
    FilterConv2d,
    SelfAttention,
    orthogonal_term,
)
from dist_train.networks import Networks
from dist_train.networks.initialisation import initialise
from dist_train.objectives import Turn
from dist_train.objectives.gan import GAN
from dist_train.testing import spawn_ranks
from dist_train.verify import parity
from dist_train.world import World

LABELS = torch.tensor([2, 0, 2, 1, 3])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("width", "size", "parts"), [(4, 32, 4), (8, 16, 3)])
def test_shapes_at_two_widths(width: int, size: int, parts: int) -> None:
    sizes = {"channels": 3, "image_size": size, "num_classes": 4}
    generator = BigGANGenerator(latent_dim=2 * parts, width=width, embedding=5, **sizes)
    discriminator = BigGANDiscriminator(width=width, **sizes)
    image = generator(torch.randn(5, 2 * parts), LABELS)
    assert image.shape == (5, 3, size, size)
    assert image.abs().max() <= 1
    assert discriminator(image, LABELS).shape == (5,)
    maps = [
        (block.conv1.in_channels // width, block.conv1.out_channels // width)
        for block in generator.blocks
    ]
    assert maps == ([(4, 4), (4, 2), (2, 1)] if size == 32 else [(2, 2), (2, 1)])
    for network, seen in ((generator, []), (discriminator, [])):
        network.attention.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y.shape[2]))
        network(torch.randn(5, 2 * parts) if network is generator else image, LABELS)
        assert seen == [size // 2]


def test_without_classes_there_is_neither_embedding_nor_label() -> None:
    generator, discriminator = (
        BigGANGenerator(latent_dim=8, width=2),
        BigGANDiscriminator(width=2),
    )
    assert discriminator(generator(torch.randn(2, 8))).shape == (2,)
    assert not [
        m for n in (generator, discriminator) for m in n.modules() if isinstance(m, nn.Embedding)
    ]
    for network, x in (
        (generator, torch.randn(2, 8)),
        (discriminator, torch.randn(2, 3, 32, 32)),
    ):
        with pytest.raises(ValueError, match="num_classes is 0, but the network was given a label"):
            network(x, LABELS[:2])
    with pytest.raises(ValueError, match="latent_dim must be a multiple of 4"):
        BigGANGenerator(latent_dim=10)


def test_each_block_has_a_part_of_z_of_its_own() -> None:
    """A gradient reaches a block's norms from the class and from that block's part alone."""
    generator = BigGANGenerator(latent_dim=8, width=2, embedding=3, num_classes=4)
    latent = torch.randn(5, 8, requires_grad=True)
    conditions: list[Tensor] = []
    for block in generator.blocks:
        block.norm1.register_forward_hook(lambda _, x, y: conditions.append(x[1]))
    generator(latent, LABELS)
    for index, condition in enumerate(conditions, start=1):
        (reached,) = torch.autograd.grad(condition.sum(), latent, retain_graph=True)
        wanted = torch.zeros(5, 8)
        wanted[:, 2 * index : 2 * index + 2] = 1
        assert torch.equal(reached, wanted)
        assert torch.equal(condition[:, 2:], generator.embedding(LABELS))


def test_conditional_batch_norm_is_the_loop_over_samples() -> None:
    norm = ConditionalBatchNorm2d(3, 4).double()
    classes = torch.randn(4, 4, dtype=torch.float64)  # a condition each
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    y = norm(x, classes[LABELS])
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    for row, label in enumerate(LABELS):
        gain = 1 + norm.gain.weight @ classes[label]
        shift = norm.shift.weight @ classes[label]
        for channel in range(3):
            standard = (x[row, channel] - mean[channel]) / (variance[channel] + 1e-5).sqrt()
            assert torch.allclose(y[row, channel], gain[channel] * standard + shift[channel])


def test_self_attention_is_the_loop_over_positions() -> None:
    layer = SelfAttention(8).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)  # the gate starts at 0
    with torch.no_grad():
        layer.gate.fill_(0.7)
    found = layer(x).detach().numpy()
    key, query, value, output = (
        part.weight.detach().numpy()[:, :, 0, 0]
        for part in (layer.key, layer.query, layer.value, layer.output)
    )
    assert key.shape == query.shape == (1, 8)
    assert value.shape == (4, 8)
    for row, maps in enumerate(x.numpy().reshape(2, 8, 12)):
        for j in range(12):
            scores = [(key @ maps[:, i]) @ (query @ maps[:, j]) for i in range(12)]
            share = np.exp(scores) / np.exp(scores).sum()
            seen = sum(share[i] * (value @ maps[:, i]) for i in range(12))
            wanted = maps[:, j] + 0.7 * output @ seen
            assert np.allclose(found.reshape(2, 8, 12)[row, :, j], wanted)


def test_the_score_is_the_projection() -> None:
    """Miyato and Koyama's eq. 3, with the sum over positions as features; a class moves the score by v_y' h alone."""
    network = BigGANDiscriminator(width=3, num_classes=4).eval()
    image = torch.randn(5, 3, 32, 32)
    features: list[Tensor] = []
    network.blocks[-1].register_forward_hook(lambda _, x, y: features.append(y))
    found = network(image, LABELS)
    h = features[0].relu().flatten(2).sum(2)
    wanted = h @ network.score.weight[0] + network.score.bias
    wanted = wanted + (h * network.embedding.weight[LABELS]).sum(1)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_every_weight_of_the_discriminator_has_a_largest_singular_value_of_one() -> None:
    network = BigGANDiscriminator(width=4, num_classes=5)
    initialise(network, {"name": "he"})
    for _ in range(200):
        network(torch.randn(2, 3, 32, 32), LABELS[:2])
    network.eval()
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) == 3 * 3 + 2 + 4 + 2  # blocks, attention, score and classes
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(largest) == pytest.approx(1, abs=2e-3)


def test_weights_start_orthogonal() -> None:
    generator = BigGANGenerator(latent_dim=8, width=4, embedding=6, num_classes=4)
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            singular = torch.linalg.svdvals(module.weight.flatten(1))
            assert torch.allclose(singular, torch.ones_like(singular), atol=1e-5)
    _, term = generator(torch.randn(3, 8), LABELS[:3], True)
    assert float(term.detach()) < 1e-9


def test_the_orthogonal_term_is_its_formula_and_so_is_its_gradient() -> None:
    """||W W' * (1 - I)||^2, whose gradient is 4 (W W' * (1 - I)) W; by differences too."""
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    term = orthogonal_term(weight)
    w = weight.detach().flatten(1)
    off = (w @ w.T) * (1 - torch.eye(4, dtype=torch.float64))
    assert float(term.detach()) == pytest.approx(float(torch.linalg.matrix_norm(off) ** 2))
    (gradient,) = torch.autograd.grad(term, weight)
    assert torch.allclose(gradient.flatten(1), 4 * off @ w)
    assert torch.autograd.gradcheck(orthogonal_term, [weight])
    lengths = torch.tensor([1.0, 2.0, 3.0])
    assert float(orthogonal_term(torch.diag(lengths))) == 0  # lengths are free
    with torch.autocast("cpu", torch.bfloat16):
        single = float(orthogonal_term(weight.detach().float()))
    assert single == pytest.approx(float(term.detach()), rel=1e-5)  # not in half precision


def generator_of() -> BigGANGenerator:
    generator = BigGANGenerator(latent_dim=8, width=3, embedding=4, num_classes=4)
    initialise(generator, {"name": "he"})
    return generator


def test_a_generator_adds_up_the_terms_of_its_convolutions_but_attention() -> None:
    generator = generator_of()
    image, term = generator(torch.randn(3, 8), LABELS[:3], True)
    convolutions = [m for m in generator.modules() if isinstance(m, FilterConv2d)]
    assert len(convolutions) == 3 * 3 + 1
    wanted = sum(orthogonal_term(m.weight) for m in convolutions)
    assert torch.allclose(term, torch.as_tensor(wanted))
    assert image.shape == (3, 3, 32, 32)


def micro_batch(label: Tensor) -> MicroBatch:
    fields: dict[str, Any] = {"image": torch.rand(len(label), 3, 32, 32) * 2 - 1, "label": label}
    return fields  # type: ignore[return-value]


def test_the_generator_minimises_the_hinge_loss_and_the_term() -> None:
    generator, discriminator = generator_of(), BigGANDiscriminator(width=3, num_classes=4).eval()
    networks = Networks({"generator": generator, "discriminator": discriminator})
    micro = micro_batch(LABELS)
    objective = GAN(loss="hinge", latent_dim=8, num_classes=4, orthogonal=0.01)

    torch.manual_seed(1)
    loss, logged = objective.loss(Turn("generator", 1), networks, micro, {})
    torch.manual_seed(1)
    image, term = generator(torch.randn(5, 8), LABELS, True)
    score = discriminator(image, LABELS).detach().numpy()
    assert float(loss.detach()) == pytest.approx(-score.mean() + 0.01 * float(term.detach()))
    assert float(logged["orthogonal"]) == pytest.approx(float(term.detach()))

    torch.manual_seed(1)
    loss, _ = objective.loss(Turn("discriminator", 0), networks, micro, {})
    real = discriminator(micro["image"], LABELS).detach().numpy()
    wanted = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + score).mean()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="orthogonal: got -1"):
        GAN(orthogonal=-1)
    alone = Networks({"generator": lambda z, label: z, "discriminator": discriminator})
    with pytest.raises(UserError, match="leave orthogonal out for a generator that gives"):
        objective.loss(Turn("generator", 1), alone, micro, {})


def test_a_step_reaches_every_weight_and_takes_the_orthogonal_term_down() -> None:
    """The gate, at 0, hides attention's weights from the first step only."""
    players = {
        "generator": generator_of(),
        "discriminator": BigGANDiscriminator(width=3, num_classes=4),
    }
    networks = Networks(players)
    objective = GAN(loss="hinge", latent_dim=8, num_classes=4, orthogonal=0.1)
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.99))
        for name, network in players.items()
    }
    terms = []
    for step in range(2):
        for turn in objective.turns(step):
            loss, logged = objective.loss(turn, networks, micro_batch(LABELS), {})
            optimizers[turn.player].zero_grad()
            loss.backward()
            optimizers[turn.player].step()
            terms += [float(logged["orthogonal"])] if "orthogonal" in logged else []
            weights = players[turn.player].named_parameters()
            asleep = {name for name, weight in weights if not weight.grad.any()}  # type: ignore[union-attr]
            assert all(name.startswith("attention.") for name in asleep)
            assert not asleep or step == 0
    assert terms[1] < terms[0]


def test_two_ranks_are_one_where_weights_are_whole_and_where_they_are_cut(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Conditional norms have the groups of one process, and the orthogonal term acts once. ZeRO-2: test_curriculum."""
    case, data = "biggan_generator-biggan_discriminator-gan", str(tiny_data)
    curriculum.pack_pictures(tiny_data / "pictures")
    recipe = curriculum.recipe_of(case, data, strategy="single").set("callbacks.checkpoint", None)
    with parity.trainer_of(recipe, World(), tmp_path / "reference") as trainer:
        parity.write_reference(trainer, 1)
    strategies = ["ddp", "zero3", "fsdp2"]
    found = spawn_ranks(2, curriculum.under, data, str(tmp_path), case, strategies, timeout=250)[0]
    print(found)
    for name in strategies:
        assert found[name]["loss"][0] <= 1e-6
        assert found[name]["gradient"][0] <= 1e-6, found[name]
