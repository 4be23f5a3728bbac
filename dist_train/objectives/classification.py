"""Classification: the negative log-likelihood of the right class."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class Classification(Objective):
    """Cross-entropy of `model(image) -> logits (B, K)` against `label` (B,), with optional label smoothing.

    Label smoothing (Szegedy et al. 2016, sec. 7): the target is 1 - s for the right class plus s / K for each.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = networks.model(micro["image"])
        loss = F.cross_entropy(logits, micro["label"], label_smoothing=self.label_smoothing)
        return loss, {"loss": loss.detach()}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        logits = networks.model(micro["image"])
        losses = F.cross_entropy(
            logits[: micro.real], micro["label"][: micro.real], reduction="none"
        )
        return {
            "logits": logits,
            "loss_sum": losses.double().sum(),
            "loss_count": losses.new_tensor(micro.real),
        }
