"""Exact likelihood under a flow: density of the base, and the change of volume (Dinh et al. 2015, arXiv:1410.8516)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError, nearest
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.objectives.likelihoods import LEVELS


def log_standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + z.square())


def log_standard_logistic(z: Tensor) -> Tensor:
    return F.logsigmoid(z) + F.logsigmoid(-z)


PRIORS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": log_standard_normal,
    "logistic": log_standard_logistic,
}
"""Log-densities of the base, of each number: NICE's is logistic, RealNVP's Gaussian."""


class Likelihood(Objective):
    """`model(x) -> z, log |det dz/dx|`, and `model(z, True)` its inverse; the loss is -log p(x) / D, nats a dimension.

    Pixels are levels: noise within a level makes a density of them, which bounds the mass of the level from below
    (Theis et al. 2016, arXiv:1511.01844). What the flow sees is the logit of alpha + (1 - 2 alpha) y, as RealNVP does.

    Args:
        shape: that of a sample, as [1, 28, 28].
        prior: the base, `gaussian` or `logistic`.
        alpha: keeps the logit finite at black and white. inputs: the field; one that is not `image` is taken as it is.
    """

    def __init__(
        self,
        shape: Sequence[int],
        prior: str = "gaussian",
        alpha: float = 0.05,
        inputs: str = "image",
    ) -> None:
        if prior not in PRIORS:
            raise UserError(
                f"prior: got '{prior}', expected one of {', '.join(PRIORS)}{nearest(prior, PRIORS)}"
            )
        if not 0 < alpha < 0.5:
            raise UserError(f"alpha: got {alpha}, expected a number in (0, 0.5)")
        self.shape, self.prior, self.alpha, self.inputs = tuple(shape), prior, alpha, inputs
        self.dimensions = math.prod(self.shape)
        if inputs == "image":
            self.scale = "unit"

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self._log_density(networks, micro).mean() / self.dimensions
        logged = {"loss": loss.detach()}
        if self.inputs == "image":
            logged["bits_per_dim"] = loss.detach() / math.log(2)
        return loss, logged

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        nll = -self._log_density(networks, micro)  # (B,)
        outputs = {
            "nll": nll,
            "loss_sum": nll[: micro.real].double().sum() / self.dimensions,
            "loss_count": nll.new_tensor(micro.real),
        }
        if self.inputs == "image":
            outputs["bits_per_dim"] = nll / (math.log(2) * self.dimensions)
        return outputs

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        return {"log_likelihood": self._log_density(networks, micro)}

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        if self.inputs != "image":
            return {}
        z = torch.randn(count, *self.shape, device=device)
        if self.prior == "logistic":
            z = torch.rand_like(z).clamp(1e-6, 1 - 1e-6).logit()
        y = networks.model(z, True)[0].sigmoid()
        return {"flow": ((y - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)}

    def _log_density(self, networks: Networks, micro: MicroBatch) -> Tensor:
        """log p of each sample (B,), in nats: of images a bound on the log of a mass, in units of levels."""
        x = micro[self.inputs]
        log_slope = x.new_zeros(len(x))
        if x.shape[1:] != self.shape:
            raise UserError(
                f"objective.shape: got {list(self.shape)}, but samples are {list(x.shape[1:])}"
            )
        if self.inputs == "image":
            x, log_slope = logit(dequantised(x), self.alpha)
            log_slope = log_slope - self.dimensions * math.log(LEVELS)
        z, log_det = networks.model(x)
        return PRIORS[self.prior](z).flatten(1).sum(dim=1) + log_det + log_slope


def dequantised(x: Tensor) -> Tensor:
    """Levels as x = level / 255 -> (level + u) / 256 in [0, 1), u uniform in [0, 1)."""
    return ((x * (LEVELS - 1)).round() + torch.rand_like(x)) / LEVELS


def logit(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The logit of p = alpha + (1 - 2 alpha) y, and the log of its slope summed over a sample: (B, ...) and (B,)."""
    p = alpha + (1 - 2 * alpha) * y
    x = p.log() - (-p).log1p()
    log_slope = math.log(1 - 2 * alpha) - F.logsigmoid(x) - F.logsigmoid(-x)
    # log of dp/dy / (p (1 - p)), and p = sigmoid(x)
    return x, log_slope.flatten(1).sum(dim=1)
