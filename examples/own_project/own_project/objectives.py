"""Objectives: whose turn it is, and that turn's loss, written as if on one device."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma times cross-entropy, one value a sample (B,), p the probability of the right class.

    Lin et al. 2017, arXiv:1708.02002: samples that are right already count less.
    """
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return (-(-cross_entropy).expm1()).pow(gamma) * cross_entropy


class FocalLoss(Objective):
    """Classification that looks at hard samples first."""

    def __init__(self, gamma: float = 2.0) -> None:
        if gamma < 0:
            raise ValueError(f"gamma: got {gamma}, expected 0 or more")
        self.gamma = gamma

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = focal_loss(networks.model(micro["image"]), micro["label"], self.gamma).mean()
        return loss, {"loss": loss.detach()}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        logits = networks.model(micro["image"])
        losses = focal_loss(logits, micro["label"], self.gamma)[: micro.real]
        return {
            "logits": logits,
            "loss_sum": losses.double().sum(),
            "loss_count": losses.new_tensor(micro.real),
        }
