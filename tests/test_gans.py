"""Adversarial objectives: losses against closed forms, distances against known ones, modes that are counted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import curriculum
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import randomness
from dist_train.callbacks.mode_watch import ModeWatch
from dist_train.errors import UserError
from dist_train.models.cyclegan import Translator
from dist_train.models.dcgan import DCGANDiscriminator, DCGANGenerator, smallest
from dist_train.models.gan_mlp import MLPDiscriminator, MLPGenerator
from dist_train.objectives.adversarial import LOSSES, gradient_penalty, minus_distance
from dist_train.objectives.cyclegan import cycle_loss, pooled
from dist_train.objectives.gan import GAN
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.sample_quality import (
    CoveredModes,
    FrechetDistance,
    covered_modes,
    frechet_distance,
    nearest_mode,
    precision_recall,
)
from dist_train.trained import evaluate, restore


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_best_discriminator_is_p_over_p_plus_q_and_its_value_the_divergence() -> None:
    """Over six outcomes, each as often as p and q say: a free score for each, at the minimum of the loss."""
    p, q = torch.tensor([1, 2, 3, 10, 4, 0]), torch.tensor([5, 5, 4, 3, 2, 1])
    real, fake = (torch.arange(6).repeat_interleave(count) for count in (p, q))
    score = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS(
        [score], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        best.zero_grad()
        loss = LOSSES["minimax"][0](score[real], score[fake])
        loss.backward()
        return loss

    best.step(closure)
    p, q = p.double() / p.sum(), q.double() / q.sum()
    assert torch.allclose(score.detach().sigmoid(), p / (p + q), atol=1e-6)
    middle = (p + q) / 2
    jensen_shannon = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum() / 2
    assert -float(closure().detach()) == pytest.approx(
        2 * float(jensen_shannon) - math.log(4), abs=1e-6
    )


@pytest.mark.parametrize("score", [-80.0, -1.0, 0.0, 2.0, 80.0])
def test_losses_are_their_formulas_and_stay_finite(score: float) -> None:
    fake = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    real = torch.tensor([0.3], dtype=torch.float64)
    d, d_real = torch.sigmoid(fake.detach()), torch.sigmoid(real)
    one_minus = torch.sigmoid(-fake.detach())  # 1 - D without rounding
    expected = {
        "minimax": (-d_real.log() - one_minus.log(), one_minus.log()),
        "non_saturating": (-d_real.log() - one_minus.log(), -d.log()),
        "least_squares": ((real - 1) ** 2 / 2 + fake**2 / 2, (fake - 1) ** 2 / 2),
        "wasserstein": (fake - real, -fake),
        "hinge": ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0), -fake),
    }
    assert set(expected) == set(LOSSES)
    for name, (of_both, of_fake) in LOSSES.items():
        assert torch.allclose(of_both(real, fake), expected[name][0])
        assert torch.allclose(of_fake(fake), expected[name][1])
        assert torch.isfinite(torch.autograd.grad(of_fake(fake), fake)[0]).all()


def test_minimax_saturates_where_the_other_does_not() -> None:
    fake = torch.tensor([-20.0], requires_grad=True)  # a discriminator that is sure
    slopes = {
        name: float(torch.autograd.grad(LOSSES[name][1](fake), fake)[0].abs())
        for name in ("minimax", "non_saturating")
    }
    assert slopes["minimax"] < 1e-8
    assert slopes["non_saturating"] == pytest.approx(1)


def test_gradient_penalty_is_the_double_backward_by_hand() -> None:
    """D(x) = u tanh(W x): its slope is W' (u (1 - t^2)), whose norm's derivatives are taken by hand."""
    torch.manual_seed(0)
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    u = torch.randn(5, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 4, 3, dtype=torch.float64)
    between = torch.rand(4, 1, dtype=torch.float64)
    penalty = gradient_penalty(lambda x: torch.tanh(x @ w.T) @ u, real, fake, between)
    found_w, found_u = torch.autograd.grad(penalty, [w, u])

    x = between * real + (1 - between) * fake
    total, by_w, by_u = 0.0, torch.zeros_like(w), torch.zeros_like(u)
    for row in x:
        t = torch.tanh(w @ row).detach()
        s = 1 - t**2
        g = w.detach().T @ (u.detach() * s)
        n = g.norm()
        total += float((n - 1) ** 2)
        r = 2 * (n - 1) / n * (w.detach() @ g)  # d penalty / d (u s)
        by_u += s * r
        by_w += torch.outer(u.detach() * s, 2 * (n - 1) / n * g)
        by_w += torch.outer(r * u.detach() * -2 * t * s, row)
    assert float(penalty.detach()) == pytest.approx(total / 4)
    assert torch.allclose(found_w, by_w / 4)
    assert torch.allclose(found_u, by_u / 4)


def test_a_critic_with_the_penalty_estimates_the_wasserstein_distance() -> None:
    """Two normal distributions of the plane, one moved by (1.5, 2): their distance is 2.5.

    At its best a critic of slope s gains s W - penalty (s - 1)^2, so s = 1 + W / (2 penalty): 50 leaves 2.5 %.
    """
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
    )
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.9))
    move = torch.tensor([1.5, 2.0])

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 2) + move, torch.randn(count, 2)

    for _ in range(300):
        real, fake = drawn(128)
        loss = minus_distance(critic(real), critic(fake))
        loss = loss + 50 * gradient_penalty(critic, real, fake, torch.rand(128, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    estimate = -float(minus_distance(*(critic(x) for x in drawn(20000))))
    assert estimate == pytest.approx(2.5, rel=0.1)


def sigma(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))


def test_spectral_norm_of_every_layer_stays_one_while_it_learns() -> None:
    torch.manual_seed(0)
    network = DCGANDiscriminator(width=4, norm="spectral", image_size=16)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, betas=(0.0, 0.9))
    images = torch.rand(40, 8, 1, 16, 16) * 2 - 1
    for real in images:
        loss = F.softplus(-network(real)).mean() + F.softplus(network(-real.abs())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    before = [buffer.clone() for buffer in network.buffers()]
    for layer in [*network.downs, network.score]:
        assert sigma(layer.weight) <= 1 + 1e-3
        assert sigma(layer.weight) >= 1 - 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))


def test_shapes_labels_and_sizes() -> None:
    label, latent = torch.tensor([0, 3]), torch.randn(2, 6)
    for make_generator, make_discriminator in (
        (MLPGenerator, MLPDiscriminator),
        (DCGANGenerator, DCGANDiscriminator),
    ):
        parts: dict[str, Any] = {"channels": 3, "image_size": 32, "num_classes": 4}
        generator, discriminator = (
            make_generator(latent_dim=6, **parts),
            make_discriminator(**parts),
        )
        image = generator(latent, label)
        assert image.shape == (2, 3, 32, 32) and image.abs().max() <= 1
        assert discriminator(image, label).shape == (2,)
        assert not torch.equal(generator.eval()(latent, label), generator(latent, label.flip(0)))
        assert not torch.equal(
            discriminator.eval()(image, label), discriminator(image, label.flip(0))
        )
        with pytest.raises(
            ValueError, match="num_classes is 4, but the network was given no label"
        ):
            discriminator(image)
    assert [smallest(size) for size in (8, 28, 32, 64)] == [(4, 1), (7, 2), (4, 3), (4, 4)]
    with pytest.raises(ValueError, match="image_size must be"):
        smallest(36)


def test_the_two_hidden_layers_are_as_wide_as_published() -> None:
    count = sum(p.numel() for p in MLPDiscriminator().parameters())
    assert count == (784 + 1) * 512 + (512 + 1) * 512 + 512 + 1


def test_a_translator_with_a_skip_starts_as_the_identity() -> None:
    image = torch.rand(2, 3, 16, 16) * 1.9 - 0.95
    assert torch.allclose(Translator(width=4, skip=True)(image), image, atol=2e-3)


def test_cycle_loss_is_0_for_inverse_maps() -> None:
    a, b = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    loss, to_b, to_a = cycle_loss(lambda x: 2 * x.flip(3), lambda y: y.flip(3) / 2, a, b)
    assert float(loss) == 0
    assert torch.equal(to_b, 2 * a.flip(3))
    assert torch.equal(to_a, b.flip(3) / 2)
    loss, _, _ = cycle_loss(lambda x: x + 1, lambda y: y, a, b)
    assert float(loss) == pytest.approx(2)


def test_a_pool_gives_back_earlier_fakes_and_loses_none() -> None:
    torch.manual_seed(0)
    pool: Tensor | None = None
    given, seen = [], []
    for i in range(40):
        fake = torch.arange(2.0).add(2 * i).view(2, 1, 1, 1)
        out, pool = pooled(pool, fake, 6)
        given += fake.flatten().tolist()
        seen += out.flatten().tolist()
        assert pool.shape == (6, 1, 1, 1)
    assert pool is not None
    assert given[:2] == seen[:2]
    swapped = sum(a != b for a, b in zip(given, seen, strict=True))
    assert 26 <= swapped <= 52  # half of 78
    waiting = set(pool.flatten().tolist())
    assert set(given) == set(seen) | waiting  # each fake was shown, or waits


def test_frechet_distance_of_normal_distributions() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    c, d = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0]))
    assert frechet_distance(a, c, b, d) == pytest.approx(5 + (2 - 1) ** 2 + (1 - 3) ** 2)
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 5, dtype=torch.float64)
    one, two = x @ x.T, y @ y.T
    values = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    mean = torch.zeros(5)
    expected = float(one.trace() + two.trace() - 2 * values)
    assert frechet_distance(mean, one, mean, two) == pytest.approx(expected)


class Rows:
    """Of a micro-batch what metrics see: the last row is padding."""

    real = 9

    def __getitem__(self, field: str) -> Tensor:
        raise KeyError(field)


def test_metrics_sum_over_micro_batches_what_the_whole_would_give() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, 10, 3, dtype=torch.float64)
    classes = torch.randint(0, 5, (2, 4, 10))
    distance, modes = FrechetDistance(), CoveredModes()
    totals = [torch.zeros(()), torch.zeros(())]
    for part in range(4):
        outputs = {
            "real_features": real[part],
            "features": fake[part],
            "real_class": classes[0, part],
            "class": classes[1, part],
        }
        totals[0] = totals[0] + distance(outputs, Rows()).values
        totals[1] = totals[1] + modes(outputs, Rows()).values
    whole = [x[:, :9].reshape(36, 3) for x in (real, fake)]
    expected = frechet_distance(
        whole[0].mean(0), whole[0].T.cov(), whole[1].mean(0), whole[1].T.cov()
    )
    assert distance.finish(totals[0].tolist()) == pytest.approx(expected)
    counts = [c[:, :9].flatten().bincount(minlength=5).tolist() for c in classes]
    assert modes.finish(totals[1].tolist()) == covered_modes(counts[1], counts[0])
    with pytest.raises(UserError, match="class 1024, but modes are counted up to 1024"):
        modes({"class": torch.tensor([3, 1024]), "real_class": torch.tensor([3, 3])}, Rows())


def test_the_ring_of_8_gaussians_has_its_modes_counted() -> None:
    torch.manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    centres = torch.stack([angle.cos(), angle.sin()], dim=1) * 2

    def ring(modes: list[int], count: int) -> Tensor:
        which = torch.tensor(modes)[torch.randint(len(modes), (count,))]
        return centres[which] + 0.02 * torch.randn(count, 2)

    real = ring(list(range(8)), 800)
    wanted = nearest_mode(real, centres, 0.2).bincount(minlength=8).tolist()
    assert sum(wanted) == 800
    for modes in ([0], [1, 5], [0, 2, 4, 6], list(range(8))):
        samples = ring(modes, 400)
        found = nearest_mode(samples, centres, 0.2)
        assert covered_modes(found.bincount(minlength=8).tolist(), wanted) == len(modes)
        precision, recall = precision_recall(real, samples)
        assert precision > 0.85
        assert recall == pytest.approx(len(modes) / 8, abs=0.12)
    noise = torch.rand(400, 2) * 6 - 3
    found = nearest_mode(noise, centres, 0.05)
    assert (found == -1).double().mean() > 0.95
    assert precision_recall(real, noise)[0] < 0.05


def test_turns() -> None:
    objective = GAN(discriminator_steps=3)
    players = [[turn.player for turn in objective.turns(step)] for step in range(6)]
    assert players == [["discriminator"], ["discriminator"], ["discriminator", "generator"]] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss": "minmax"}, "loss: got 'minmax', expected one of minimax"),
        ({"discriminator_steps": 0}, "discriminator_steps: got 0"),
        ({"latent_dim": 0}, "latent_dim: got 0"),
        ({"num_classes": -1}, "num_classes: got -1"),
        (
            {"judge": "nowhere"},
            "judge: got '.*nowhere', expected the run directory of a classifier$",
        ),
        (
            {"judge": "runs/lenet-mnist"},
            "classifier; first `dist-train train lenet-mnist --run-dir .*runs/lenet-mnist`",
        ),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GAN(**arguments)


def test_mode_watch_needs_a_judge() -> None:
    recipe = curriculum.recipe_of("mlp_generator-mlp_discriminator-gan", "nowhere")
    with pytest.raises(UserError, match=r"needs an evaluate section and objective\.judge"):
        ModeWatch().configure(recipe)


def judged_recipe(data: Path, judge: Path) -> Recipe:
    recipe = curriculum.recipe_of("mlp_generator-mlp_discriminator-gan", str(data))
    wanted = {
        "data__path": str(data / "digits"),
        "strategy": "single",
        "objective__judge": str(judge),
        "evaluate": {
            "split": "test",
            "every": "3 steps",
            "metrics": ["frechet_distance", "covered_modes", "label_agreement"],
            "best": "frechet_distance",
            "mode": "min",
        },
        "callbacks": {
            "mode_watch": {},
            "clip_weights": {"bound": 0.05, "players": ["discriminator"]},
            "checkpoint": {"every": "3 steps"},
        },
    }
    for key, value in wanted.items():
        recipe = recipe.set(key.replace("__", "."), value)
    return recipe


def test_a_trained_judge_measures_a_gan(tiny_data: Path, tmp_path: Path) -> None:
    """The judge is a perceptron: of the real it says what it says itself, of the samples what the metrics say."""
    data = {"path": str(tiny_data / "digits"), "global_batch": 32, "micro_batch": 32}
    classifier = Recipe(
        name="judge",
        duration="40 steps",
        strategy="single",
        threads=1,
        data=data,
        model={
            "name": "mlp",
            "depth": 1,
            "width": 16,
            "in_features": "auto",
            "num_outputs": "auto",
        },
        objective={"name": "classification"},
        optimizer={"name": "adam", "learning_rate": 1e-2},
        evaluate={"split": "test", "every": "40 steps", "metrics": ["accuracy"]},
        callbacks={"checkpoint": {"every": "40 steps"}},
    )
    train(classifier, run_dir=tmp_path / "judge")
    train(judged_recipe(tiny_data, tmp_path / "judge"), run_dir=tmp_path / "gan")
    figures = evaluate(tmp_path / "gan")["results"]

    run = restore(tmp_path / "gan")
    clipped = run.full_weights("discriminator").values()
    assert max(float(tensor.abs().max()) for tensor in clipped) == pytest.approx(0.05)
    free = run.full_weights("generator").values()
    assert max(float(tensor.abs().max()) for tensor in free) > 0.1
    kept: dict[str, list[Tensor]] = {}
    for micro in run.evaluation:
        randomness.reseed(run.seed, run.step, randomness.EVALUATION, micro.index)
        outputs = run.objective.evaluate(run.view(), micro) | {"label": micro["label"]}
        for name, value in outputs.items():
            kept.setdefault(name, []).append(value[: micro.real])
    seen = {name: torch.cat(parts) for name, parts in kept.items()}
    assert seen["features"].shape == (60, 16)
    right = (seen["real_class"] == seen["label"]).double().mean()
    assert float(right) == evaluate(tmp_path / "judge")["results"]["accuracy"]
    agreement = (seen["class"] == seen["label"]).double().mean()
    assert float(agreement) == pytest.approx(figures["label_agreement"])
    real, fake = seen["real_features"].double(), seen["features"].double()
    expected = frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
    assert figures["frechet_distance"] == pytest.approx(expected)

    lines = (tmp_path / "gan" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "modes/covered" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[-1]["modes/covered"] == figures["covered_modes"]
    shares = seen["class"].bincount() / 60
    assert rows[-1]["modes/shares"][: len(shares)] == pytest.approx(shares.tolist())
    assert (rows[-1]["modes/precision"], rows[-1]["modes/recall"]) == precision_recall(real, fake)


def test_translations_are_drawn_and_measured(tiny_data: Path, tmp_path: Path) -> None:
    """Of a stream with itself, by translators that have learnt nothing: the identity."""
    recipe = curriculum.recipe_of("translator-patch_discriminator-cyclegan", str(tiny_data))
    wanted: dict[str, Any] = {
        "duration": "1 steps",
        "strategy": "single",
        "data.a.path": str(tiny_data / "digits"),
        "data.b.path": str(tiny_data / "digits"),
        "optimizer": {"name": "sgd", "learning_rate": 0.0},
        "evaluate": {
            "split": "test",
            "every": "1 steps",
            "metrics": ["paired_l1", "paired_l1_back", "identity_l1"],
        },
        "callbacks": {"translations": {}, "checkpoint": {}},
    }
    for key, value in wanted.items():
        recipe = recipe.set(key, value)
    for network in ("to_a", "to_b"):
        recipe = recipe.set(f"model.translators.{network}.skip", True)
    train(recipe, run_dir=tmp_path / "run")
    figures = evaluate(tmp_path / "run")["results"]
    assert figures["identity_l1"] == 0
    assert figures["paired_l1"] < 1e-3
    assert figures["paired_l1_back"] < 1e-3
    assert list((tmp_path / "run" / "samples").glob("translations-*.png"))
