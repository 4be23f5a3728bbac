"""G4 to G6: likelihoods, divergence and bounds against closed forms; both estimators against the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objectives import TURN, Micro
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from dist_train.diagnose.curves import diagnose
from dist_train.errors import UserError
from dist_train.models.vae import (
    VAEConvDecoder,
    VAEConvEncoder,
    VAEDecoder,
    VAEEncoder,
    VAETable,
)
from dist_train.networks import Networks
from dist_train.objectives.elbo import (
    EvidenceLowerBound,
    kl_to_standard_normal,
    log_normal,
    prior_gap,
)
from dist_train.objectives.likelihoods import LEVELS, LIKELIHOODS
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.run_directory import RunDirectory

F64 = torch.float64
VARIANCE = 0.3


def test_divergence_and_density_are_their_closed_forms() -> None:
    torch.manual_seed(0)
    mean, log_variance, z = torch.randn(3, 7, 4, dtype=F64).unbind()
    q = Normal(mean, (0.5 * log_variance).exp())
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(q, prior).sum(1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)
    torch.testing.assert_close(log_normal(z, mean, log_variance), q.log_prob(z).sum(1))


def test_likelihoods_of_numbers_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x, a, b = torch.rand(3, 5, 2, 4, 4, dtype=F64).unbind()
    one, two = a[:, None], torch.stack([a, b], dim=1)
    table = LIKELIHOODS
    torch.testing.assert_close(
        table["gaussian"].log_probability(one, x, 0.3), Normal(a, 0.3**0.5).log_prob(x)
    )
    torch.testing.assert_close(
        table["gaussian_predicted"].log_probability(two, x, 0.3),
        Normal(a, (0.3 + b.exp()).sqrt()).log_prob(x),
    )
    torch.testing.assert_close(
        table["bernoulli"].log_probability(one, x.round(), 0.3),
        Bernoulli(logits=a).log_prob(x.round()),
    )


@pytest.mark.parametrize("name", ["categorical", "discretised_logistic"])
def test_discrete_likelihoods_sum_to_1_over_the_levels(name: str) -> None:
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[name]
    numbers = torch.randn(6, likelihood.per_element, 1, dtype=F64)
    if name == "discretised_logistic":  # centres within and beyond [0, 1], wide and narrow
        centre, log_scale = torch.meshgrid(
            torch.tensor([-0.2, 0.0, 0.4, 1.0], dtype=F64),
            torch.tensor([-9.0, -5.0, -2.0], dtype=F64),
            indexing="ij",
        )
        numbers = torch.stack([centre.flatten(), log_scale.flatten()], dim=1)[:, :, None]
    x = torch.arange(LEVELS, dtype=F64) / (LEVELS - 1)
    rows = numbers.expand(-1, -1, LEVELS)
    log_p = likelihood.log_probability(rows, x.expand(len(rows), -1), 1.0)
    assert torch.isfinite(log_p).all()
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(rows), dtype=F64))


def test_a_discretised_logistic_can_be_sure_of_a_level() -> None:
    level = torch.tensor([[100 / 255]], dtype=F64)
    sure = torch.stack([level, torch.full_like(level, -20.0)], dim=1)  # (1, 2, 1)
    log_p = LIKELIHOODS["discretised_logistic"].log_probability(sure, level, 1.0)
    assert 1 - 1e-3 < float(log_p.exp()) < 1


class Linear:
    """x = W z + b + noise: log p(x) and the posterior are known."""

    def __init__(self, features: int = 5, latent: int = 2) -> None:
        torch.manual_seed(1)
        self.weight = torch.randn(features, latent, dtype=F64)
        self.bias = torch.randn(features, dtype=F64)
        inner = self.weight.T @ self.weight / VARIANCE + torch.eye(latent, dtype=F64)
        self.posterior_covariance = torch.linalg.inv(inner)
        z = torch.randn(40, latent, dtype=F64)
        self.x = self.decode(z) + VARIANCE**0.5 * torch.randn(40, features, dtype=F64)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def log_p(self) -> Tensor:
        covariance = self.weight @ self.weight.T + VARIANCE * torch.eye(len(self.bias), dtype=F64)
        return torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(self.x)

    def posterior(self) -> torch.distributions.MultivariateNormal:
        mean = (self.x - self.bias) @ self.weight @ self.posterior_covariance / VARIANCE
        return torch.distributions.MultivariateNormal(mean, self.posterior_covariance)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Not the posterior: no covariance, and not quite its mean and variance."""
        mean = self.posterior().mean + 0.1
        return mean, (1.3 * self.posterior_covariance.diagonal()).log().expand_as(mean)

    def evaluate(self, encoder: Callable[[Tensor], Any], samples: int) -> dict[str, Tensor]:
        objective = EvidenceLowerBound(
            2, "gaussian", variance=VARIANCE, importance_samples=samples, inputs="features"
        )
        networks = Networks({"encoder": encoder, "decoder": self.decode})
        return objective.evaluate(networks, Micro(features=self.x))


def test_bounds_are_in_order_and_the_gap_is_the_divergence_from_the_posterior() -> None:
    model = Linear()
    log_p, posterior = model.log_p(), model.posterior()
    mean, log_variance = model.encode(model.x)
    q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    gap = kl_divergence(q, posterior)  # (40,)
    few, many = model.evaluate(model.encode, 5), model.evaluate(model.encode, 3000)
    torch.testing.assert_close(many["elbo"], log_p - gap, atol=0.12, rtol=0)
    assert (many["elbo"] - (log_p - gap)).mean().abs() < 0.02
    assert many["elbo"].mean() < few["importance_bound"].mean() < many["importance_bound"].mean()
    torch.testing.assert_close(many["importance_bound"], log_p, atol=0.05, rtol=0)
    assert gap.mean() > 0.1  # so the order above is no rounding


def test_the_bound_is_tight_where_q_is_the_posterior() -> None:
    model = Linear()
    model.weight = torch.linalg.qr(model.weight)[0]  # its posterior has no covariance
    variance = 1 / (1 + 1 / VARIANCE)
    mean = (model.x - model.bias) @ model.weight * variance / VARIANCE
    log_variance = torch.full_like(mean, math.log(variance))
    found = model.evaluate(lambda x: (mean, log_variance), 3)
    torch.testing.assert_close(found["importance_bound"], model.log_p())
    torch.testing.assert_close(found["loss_sum"], -found["elbo"].sum())


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("inference", ["amortised", "per_sample"])
def test_both_estimators_have_the_exact_gradient(inference: str, draws: int) -> None:
    """Of one sample, copied: the gradient of each copy is one draw of the estimator. With an encoder they are those of
    its outputs, without one those of the sample's own parameters."""
    copies, model = 20_000, Linear()
    x = model.x[:1]
    mean, log_variance = torch.tensor([[0.4, -0.2]], dtype=F64), torch.tensor([[-1.0, -0.5]])
    slope = model.weight.T @ (x - model.decode(mean)).squeeze(0) / VARIANCE - mean.squeeze(0)
    v = log_variance.double().exp().squeeze(0)
    curve = -0.5 * (model.weight.square().sum(0) / VARIANCE * v + v - 1)
    exact = -torch.cat([slope, curve])  # of the loss, minus the bound
    variances = {}
    for estimator in ("reparameterised", "score_function"):
        torch.manual_seed(2)
        table = VAETable(copies, 2).double()
        with torch.no_grad():
            table.table.weight.copy_(torch.cat([mean, log_variance.double()], 1).expand(copies, 4))

        def encoder(given: Tensor, table: VAETable = table) -> tuple[Tensor, Tensor]:
            ids = given if inference == "per_sample" else torch.arange(len(given))
            return table(ids)

        objective = EvidenceLowerBound(
            2,
            "gaussian",
            variance=VARIANCE,
            inputs="features",
            estimator=estimator,
            inference=inference,
            draws=draws,
        )
        networks = Networks({"encoder": encoder, "decoder": model.decode})
        loss, logged = objective.loss(TURN, networks, Micro(features=x.expand(copies, -1)), {})
        loss.backward()
        torch.testing.assert_close(loss.detach(), logged["reconstruction"] + logged["kl"])
        assert table.table.weight.grad is not None
        each = table.table.weight.grad * copies  # (copies, 4)
        error = each.std(dim=0) / copies**0.5
        assert ((each.mean(dim=0) - exact).abs() < 3 * error).all(), estimator
        variances[estimator] = each.var(dim=0)
    ratio = (variances["score_function"] / variances["reparameterised"]).tolist()
    print(f"variance of the score function / reparameterised, {draws} draws: {ratio}")
    assert min(ratio[:2]) > 1  # of the mean


def test_the_decoder_has_the_same_gradient_under_both_estimators() -> None:
    model = Linear()
    gradients = []
    for estimator in ("reparameterised", "score_function"):
        torch.manual_seed(3)
        weight = model.weight.clone().requires_grad_()
        objective = EvidenceLowerBound(
            2, "gaussian", variance=VARIANCE, inputs="features", estimator=estimator, draws=2
        )
        networks = Networks({"encoder": model.encode, "decoder": lambda z, w=weight: z @ w.T})
        objective.loss(TURN, networks, Micro(features=model.x), {})[0].backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_parameters_of_a_sample_learn_from_that_sample_alone() -> None:
    table = VAETable(10, 3)
    objective = EvidenceLowerBound(3, inference="per_sample")
    networks = Networks({"encoder": table, "decoder": VAEDecoder([1, 4, 4], 3, width=4)})
    micro = Micro(image=torch.rand(3, 1, 4, 4))
    micro.ids = [7, 2, 5]  # type: ignore[assignment]
    objective.loss(TURN, networks, micro, {})[0].backward()
    assert table.table.weight.grad is not None
    assert table.table.weight.grad.any(dim=1).nonzero().flatten().tolist() == [2, 5, 7]
    with pytest.raises(UserError, match="per_sample has no parameters for samples it was not"):
        objective.evaluate(networks, micro)


def test_beta_is_a_setting_or_a_schedule() -> None:
    model = Linear()
    networks = Networks({"encoder": model.encode, "decoder": model.decode})
    objective = EvidenceLowerBound(2, "gaussian", beta=0.5, inputs="features")
    for scalars, beta in (({}, 0.5), ({"beta": 3.0}, 3.0)):
        loss, logged = objective.loss(TURN, networks, Micro(features=model.x), scalars)
        torch.testing.assert_close(loss, logged["reconstruction"] + beta * logged["kl"])


def test_prior_gap_is_0_where_the_codes_together_are_standard_normal() -> None:
    torch.manual_seed(0)
    mean = 0.6**0.5 * torch.randn(20_000, 3)
    assert prior_gap(mean, torch.full_like(mean, math.log(0.4))) < 1e-3
    expected = 0.5 * (0.7**2 + 5 - 1 - math.log(5))
    found = prior_gap(5**0.5 * torch.randn(20_000, 3) + 0.7, torch.full((20_000, 3), -20.0))
    assert found.item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_likelihood_draws_pictures(likelihood: str, num_classes: int) -> None:
    per_element = LIKELIHOODS[likelihood].per_element
    classes = {"num_classes": num_classes}
    image = {"width": 2, "hidden": 8, "channels": 2, "image_size": 8, **classes}
    pairs = [
        (
            VAEEncoder(128, 3, width=8, **classes),
            VAEDecoder([2, 8, 8], 3, 1, 8, "relu", per_element, num_classes),
        ),
        (VAEConvEncoder(3, **image), VAEConvDecoder(3, per_element=per_element, **image)),
    ]
    for encoder, decoder in pairs:
        networks = Networks({"encoder": encoder, "decoder": decoder})
        objective = EvidenceLowerBound(3, likelihood, num_classes=num_classes)
        torch.manual_seed(0)
        drawn = objective.samples(networks, 6, "cpu")["decoder"]
        assert drawn.shape == (6, 2, 8, 8)
        assert drawn.min() >= 0 and drawn.max() <= 1
        micro = Micro(image=torch.rand(6, 2, 8, 8), label=torch.arange(6) % 3)
        found = objective.evaluate(networks, micro)
        assert found["elbo"].shape == found["importance_bound"].shape == (6,)
        assert ("bits_per_dim" in found) == (likelihood in ("categorical", "discretised_logistic"))


def test_binarised_pixels_are_0_or_1_with_their_mean() -> None:
    torch.manual_seed(0)
    micro = Micro(image=torch.full((50, 1, 20, 20), 0.3))
    for how, mean in (("sampled", 0.3), ("threshold", 0.0), ("none", 0.3)):
        x = EvidenceLowerBound(2, binarise=how)._target(micro)
        assert x.mean().item() == pytest.approx(mean, abs=0.02)
        assert how == "none" or set(x.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"likelihood": "bernouli"}, r"likelihood: got 'bernouli'.*bernoulli"),
        ({"estimator": "reinforce"}, "estimator: got 'reinforce'"),
        ({"draws": 0}, "draws: got 0"),
        ({"variance": 0.0}, "variance: got 0"),
        ({"beta": -1}, "beta: got -1"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EvidenceLowerBound(2, **settings)


def test_decoder_and_likelihood_must_agree() -> None:
    networks = Networks(
        {"encoder": VAEEncoder(16, 2, width=4), "decoder": VAEDecoder([1, 4, 4], 2)}
    )
    micro = Micro(image=torch.rand(2, 1, 4, 4))
    with pytest.raises(UserError, match="per_element: 2"):
        EvidenceLowerBound(2, "discretised_logistic").loss(TURN, networks, micro, {})
    with pytest.raises(UserError, match="latent_dim: got 5"):
        EvidenceLowerBound(5).loss(TURN, networks, micro, {})


@pytest.mark.parametrize(
    ("beta", "finding"), [(100.0, "KL too low"), (1e-4, "KL too high"), (1.0, None)]
)
def test_a_wrong_beta_is_named(
    tiny_data: Path, tmp_path: Path, beta: float, finding: str | None
) -> None:
    recipe = Recipe(
        project="tests",
        duration="150 steps",
        strategy="single",
        threads=1,
        data={
            "path": str(tiny_data / "digits"),
            "global_batch": 50,
            "micro_batch": 50,
            "scale": "unit",
        },
        model={
            "model": {
                "encoder": {
                    "name": "vae_encoder",
                    "latent_dim": 4,
                    "width": 32,
                    "in_features": "auto",
                },
                "decoder": {
                    "name": "vae_decoder",
                    "latent_dim": 4,
                    "width": 32,
                    "shape": [1, 8, 8],
                },
            }
        },
        objective={"name": "elbo", "latent_dim": 4, "likelihood": "bernoulli", "beta": beta},
        optimizer={"name": "adam", "learning_rate": 1e-2},
    )
    train(recipe, run_dir=tmp_path / "run")
    rows = RunDirectory.open(tmp_path / "run").rows()
    found = {one.name for one in diagnose(rows)} & {"KL too low", "KL too high"}
    print(beta, [(row["kl"], row["prior_gap"]) for row in rows[::4]])
    assert found == ({finding} if finding else set())
