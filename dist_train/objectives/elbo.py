"""The evidence lower bound of a latent-variable model: variational autoencoders (Kingma and Welling 2014)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError, nearest
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.objectives.likelihoods import LIKELIHOODS

INFERENCES = ("amortised", "per_sample")
ESTIMATORS = ("reparameterised", "score_function")
BINARISATIONS = ("none", "threshold", "sampled")


class EvidenceLowerBound(Objective):
    """`encoder(x) -> mean, log variance (B, Z)` and `decoder(z (B, Z))`, two networks of one player.

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)); what is trained has `beta` times the divergence (Higgins et al.
    2017), a setting or a scalar on a schedule. What is evaluated has not.

    Args:
        likelihood: what the decoder's numbers mean, one of LIKELIHOODS. variance: of `gaussian`; the least of
            `gaussian_predicted`.
        latent_dim: Z. num_classes: encoder and decoder also take the label; 0: neither does.
        inference: `per_sample`: `encoder` is a `vae_table`, which takes the ids of samples instead of x.
        estimator: `score_function`: the gradient of the encoder from log q alone (Williams 1992), with the mean of the
            other draws as baseline; it needs no gradient of log p with respect to z.
        draws: of z a sample in training. importance_samples: in evaluation.
        binarise: pixels are set to 0 or 1, by the `threshold` 1/2 or `sampled` anew at each visit, as probabilities.
        inputs: the field.
    """

    def __init__(
        self,
        latent_dim: int,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        variance: float = 0.1,
        num_classes: int = 0,
        inference: str = "amortised",
        estimator: str = "reparameterised",
        draws: int = 1,
        importance_samples: int = 10,
        binarise: str = "none",
        inputs: str = "image",
    ) -> None:
        for name, value, valid in (
            ("likelihood", likelihood, tuple(LIKELIHOODS)),
            ("inference", inference, INFERENCES),
            ("estimator", estimator, ESTIMATORS),
            ("binarise", binarise, BINARISATIONS),
        ):
            if value not in valid:
                raise UserError(
                    f"{name}: got '{value}', expected one of {', '.join(valid)}{nearest(value, valid)}"
                )
        for name, least, number in (
            ("latent_dim", 1, latent_dim),
            ("draws", 1, draws),
            ("importance_samples", 1, importance_samples),
            ("num_classes", 0, num_classes),
            ("beta", 0, beta),
        ):
            if number < least:
                raise UserError(f"{name}: got {number}, expected {least} or more")
        if variance <= 0:
            raise UserError(f"variance: got {variance}, expected more than 0")
        self.likelihood = LIKELIHOODS[likelihood]
        self.beta, self.variance, self.latent_dim = beta, variance, latent_dim
        self.num_classes, self.inference, self.estimator = num_classes, inference, estimator
        self.draws, self.importance_samples = draws, importance_samples
        self.binarise, self.inputs = binarise, inputs
        if inputs == "image":
            self.scale = "unit"

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, condition = self._target(micro), self._condition(micro)
        mean, log_variance = self._posterior(networks, micro, x, condition)
        divergence = kl_to_standard_normal(mean, log_variance)  # (B,)
        by_score = self.estimator == "score_function"
        drawn, scores = [], []
        for _ in range(self.draws):
            z = drawn_from(mean, log_variance)
            z = z.detach() if by_score else z
            drawn.append(self._log_likelihood(networks, x, z, condition))
            scores.append(log_normal(z, mean, log_variance))
        likelihood = torch.stack(drawn)  # (draws, B)
        reconstruction = -likelihood.mean()
        beta = scalars.get("beta", self.beta)
        loss = reconstruction + beta * divergence.mean()
        if by_score:
            loss = loss + without_value(-score_function(likelihood, torch.stack(scores)).mean())
        return loss, {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "kl": divergence.mean().detach(),
            "prior_gap": prior_gap(mean.detach(), log_variance.detach()),
        }

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        if self.inference == "per_sample":
            raise UserError(
                "objective.inference: per_sample has no parameters for samples it was not trained on:"
                " remove `evaluate:`, or take amortised"
            )
        x, condition = self._target(micro), self._condition(micro)
        mean, log_variance = self._posterior(networks, micro, x, condition)
        divergence = kl_to_standard_normal(mean, log_variance)  # (B,)
        likelihoods, weights = [], []
        for _ in range(self.importance_samples):
            z = drawn_from(mean, log_variance)
            likelihood = self._log_likelihood(networks, x, z, condition)
            prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
            likelihoods.append(likelihood)
            weights.append(likelihood + prior - log_normal(z, mean, log_variance))
        bound = torch.stack(likelihoods).mean(dim=0) - divergence
        tight = torch.stack(weights).logsumexp(dim=0) - math.log(self.importance_samples)
        outputs = {
            "code": mean,
            "elbo": bound,
            "importance_bound": tight,
            "kl": divergence,
            "loss_sum": -bound[: micro.real].double().sum(),
            "loss_count": bound.new_tensor(micro.real),
        }
        if self.likelihood.discrete:
            outputs["bits_per_dim"] = -bound / (math.log(2) * x[0].numel())
        return outputs

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        if self.num_classes or self.inference == "per_sample":
            raise UserError(
                "objective: elbo has codes of new samples only without a label, and amortised"
            )
        return {"code": self._posterior(networks, micro, self._target(micro), ())[0]}

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        z = torch.randn(count, self.latent_dim, device=device)
        label = torch.arange(count, device=device) % max(1, self.num_classes)
        numbers = networks.decoder(z, *[label] * bool(self.num_classes))
        if numbers.ndim != 4:
            return {}
        shape = (numbers.shape[1] // self.likelihood.per_element, *numbers.shape[2:])
        mean = self.likelihood.mean(numbers.view(count, self.likelihood.per_element, *shape))
        return {"decoder": mean.clamp(0, 1)}

    def _target(self, micro: MicroBatch) -> Tensor:
        x = micro[self.inputs]
        if self.binarise == "threshold":
            return (x >= 0.5).to(x)
        return torch.bernoulli(x) if self.binarise == "sampled" else x

    def _condition(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        return (micro["label"],) if self.num_classes else ()

    def _posterior(
        self, networks: Networks, micro: MicroBatch, x: Tensor, condition: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), (B, Z) each."""
        if self.inference == "per_sample":
            ids = torch.from_numpy(np.asarray(micro.ids)).to(x.device)
            mean, log_variance = networks.encoder(ids)
        else:
            mean, log_variance = networks.encoder(x, *condition)
        if mean.shape != (len(x), self.latent_dim):
            raise UserError(
                f"objective.latent_dim: got {self.latent_dim}, but the encoder gives {tuple(mean.shape)}"
            )
        return mean, log_variance

    def _log_likelihood(
        self, networks: Networks, x: Tensor, z: Tensor, condition: tuple[Tensor, ...]
    ) -> Tensor:
        """log p(x | z), (B,)."""
        numbers = networks.decoder(z, *condition)
        wanted = self.likelihood.per_element
        if numbers.numel() != wanted * x.numel():
            raise UserError(
                f"the decoder gives {tuple(numbers.shape)}, but this likelihood needs per_element: {wanted}"
                f" of each of {tuple(x.shape)}"
            )
        numbers = numbers.view(len(x), wanted, *x.shape[1:])
        return self.likelihood.log_probability(numbers, x, self.variance).flatten(1).sum(dim=1)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over the latent numbers: (B, Z) -> (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def prior_gap(mean: Tensor, log_variance: Tensor) -> Tensor:
    """How far the codes of all samples together are from the prior, in nats a latent number: the divergence of the
    Gaussian with their mean and variance. Of a batch of B about 1 / B where they match."""
    together = mean.mean(dim=0)
    spread = mean.var(dim=0, correction=0) + log_variance.exp().mean(dim=0)
    return kl_to_standard_normal(together[None], spread.log()[None]).squeeze() / mean.shape[1]


def drawn_from(mean: Tensor, log_variance: Tensor) -> Tensor:
    """z = mean + deviation * noise: the gradient goes through it."""
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mean, variance), summed over the latent numbers: (B, Z) -> (B,)."""
    scaled = (z - mean).square() * (-log_variance).exp()
    return -0.5 * (math.log(2 * math.pi) + log_variance + scaled).sum(dim=1)


def score_function(reward: Tensor, log_q: Tensor) -> Tensor:
    """What has the gradient of E_q reward with respect to q: reward * log q, less a baseline from the other draws of
    the same sample, which does not depend on this one, so that the mean stays (Kool et al. 2019). Both (draws, B)."""
    reward = reward.detach()
    if len(reward) > 1:
        others = (reward.sum(dim=0) - reward) / (len(reward) - 1)
        reward = reward - others
    return reward * log_q


def without_value(term: Tensor) -> Tensor:
    """0 with the gradient of the term: a loss stays the bound that it is."""
    return term - term.detach()
