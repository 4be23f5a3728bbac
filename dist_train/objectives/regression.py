"""Regression: a number with its mean squared error, or with a Gaussian whose mean and variance are predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.ensembles import check_way, log_mean_probability, mixture_moments
from dist_train.errors import UserError, nearest
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn

VARIANCES = ("fixed", "predicted")
LOG_2_PI = math.log(2 * math.pi)


def gaussian_nll(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of each element in nats: (log 2 pi + log v + (target - mean)^2 / v) / 2.

    At v = 1 it is half the squared error and a constant (Nix and Weigend 1994).
    """
    return 0.5 * (LOG_2_PI + log_variance + (target - mean).square() * (-log_variance).exp())


class Regression(Objective):
    """`model(inputs) -> (B, D)` against the field `target` (B, D), or (B,) where each sample has one number.

    The target is standardised with the statistics that stand in the index of its shards (mean 0 and deviation 1 over
    the training split), so the loss is in those units; predictions and metrics are in the target's own.

    Args:
        variance: `fixed`: the loss is the mean squared error. `predicted`: the model gives (B, 2D), means and then log
            variances, and the loss is the negative log-likelihood.
        inputs, target: the fields.
        statistics: `{field: {"mean": [D], "std": [D]}}`, from the index.
    """

    def __init__(
        self,
        variance: str = "fixed",
        inputs: str = "features",
        target: str = "target",
        statistics: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    ) -> None:
        if variance not in VARIANCES:
            raise UserError(
                f"variance: got '{variance}', expected one of {', '.join(VARIANCES)}{nearest(variance, VARIANCES)}"
            )
        self.variance, self.inputs, self.target = variance, inputs, target
        if statistics is None:  # a recipe is checked before its data are there
            statistics = {target: {"mean": [0.0], "std": [1.0]}}
        if target not in statistics:
            raise UserError(
                f"target: the index of the data has no statistics of '{target}'{nearest(target, statistics)}"
                f" (it has those of {', '.join(statistics) or 'nothing'})"
            )
        self.mean = torch.tensor(statistics[target]["mean"])
        self.std = torch.tensor([std or 1.0 for std in statistics[target]["std"]])

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = networks.model(micro[self.inputs])
        members = output.shape[1] if output.ndim == 3 else 1
        losses, *_ = self._losses(*self._of_members(output, micro))
        loss = losses.mean()
        return members * loss, {"loss": loss.detach()}

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        output = networks.model(micro[self.inputs])
        members = output.movedim(1, 0) if output.ndim == 3 else output[None]  # (M, B, ...)
        mean, std = self.mean.to(output), self.std.to(output)
        if self.variance == "fixed":
            return {"prediction": members.mean(dim=0) * std + mean}
        predicted, log_variance = members.chunk(2, dim=2)
        deviation = (0.5 * log_variance).exp() * std
        together, spread = mixture_moments(predicted * std + mean, deviation)
        return {"prediction": together, "deviation": spread}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        members = self.evaluate_members(networks, micro)
        return members[0] if len(members) == 1 else self.combine(members, micro)

    def evaluate_members(self, networks: Networks, micro: MicroBatch) -> list[dict[str, Tensor]]:
        output = networks.model(micro[self.inputs])
        each = output.unbind(dim=1) if output.ndim == 3 else (output,)
        return [self._judged(one, micro) for one in each]

    def _judged(self, output: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        """What metrics need of an output (B, D) or (B, 2D)."""
        losses, nll, mean, log_variance = self._losses(output, self._targets(micro))
        return {
            "prediction": mean * self.std + self.mean,
            "deviation": (0.5 * log_variance).exp() * self.std,
            "target": self._targets(micro),
            "nll": (nll + self.std.log()).sum(dim=1),  # a density in the target's own units
            "loss_sum": losses[: micro.real].mean(dim=1).double().sum(),
            "loss_count": losses.new_tensor(micro.real),
        }

    def combine(
        self, outputs: Sequence[dict[str, Tensor]], micro: MicroBatch, how: str = "mean"
    ) -> dict[str, Tensor]:
        """The members' mixture: its mean, deviation and negative log-likelihood."""
        if check_way(how) != "mean":
            raise UserError(f"how: got '{how}', expected mean: only classes are voted for")
        mean, deviation, nll = (
            torch.stack([one[name] for one in outputs]).double()
            for name in ("prediction", "deviation", "nll")
        )
        prediction, spread = mixture_moments(mean, deviation)
        target, std = outputs[0]["target"], self.std.to(mean)
        mixed = -log_mean_probability(-nll)  # (B,)
        losses = ((prediction - target) / std).square().mean(dim=1)
        if self.variance == "predicted":
            losses = (mixed - std.log().sum()) / len(std)
        return {
            "prediction": prediction,
            "deviation": spread,
            "target": target,
            "nll": mixed,
            "loss_sum": losses[: micro.real].sum(),
            "loss_count": losses.new_tensor(micro.real),
        }

    def _targets(self, micro: MicroBatch) -> Tensor:
        """(B, D)."""
        target = micro[self.target]
        if target.ndim > 2:
            raise UserError(
                f"objective.target: '{self.target}' is {tuple(target.shape)}, expected (B, D) or (B,) numbers"
            )
        return target[:, None] if target.ndim == 1 else target

    def _of_members(self, output: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Outputs and targets row by row: of members, (B, M, ...), each with the rows that it has seen."""
        if output.ndim == 2:
            return output, self._targets(micro)
        # (B, M, D) where each has rows of its own, else the (B, 1, D) of all
        target = micro[self.target].reshape(len(output), -1, len(self.mean))
        return output.flatten(0, 1), target.expand(-1, output.shape[1], -1).flatten(0, 1)

    def _losses(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is trained, the negative log-likelihood, mean and log variance: (B, D) each, of the standardised target.

        A variance that is not predicted is 1.
        """
        self.mean, self.std = self.mean.to(target), self.std.to(target)
        target = (target - self.mean) / self.std
        wanted = (len(target), target.shape[1] * (2 if self.variance == "predicted" else 1))
        if output.shape != wanted:
            raise UserError(
                f"the model gives {tuple(output.shape)}, but {target.shape[1]} targets with {self.variance} variance"
                f" need {wanted}"
            )
        if self.variance == "fixed":
            zero = torch.zeros_like(output)
            return (output - target).square(), gaussian_nll(output, zero, target), output, zero
        mean, log_variance = output.chunk(2, dim=1)
        nll = gaussian_nll(mean, log_variance, target)
        return nll, nll, mean, log_variance
