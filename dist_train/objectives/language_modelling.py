"""Language modelling: the negative log-likelihood of each next token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.models.transformer import generate
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class LanguageModelling(Objective):
    """Cross-entropy of `model(tokens (B, T)) -> logits (B, T, V)` with the token that follows.

    Sequences may have unequal lengths: a loss is the mean over real targets, so a micro-batch weighs as many targets
    as it has, and the gradient is that of the mean over the whole global batch (law 3).

    Args:
        chunk: 0 takes the logits as the model gives them. More: the model is asked for the weighted sum of the losses,
            `model(tokens, targets, weights, chunk) -> ()`, which it computes for so many positions at a time and never
            holds all logits.
    """

    def __init__(self, chunk: int = 0) -> None:
        if chunk < 0:
            raise UserError(f"language_modelling: chunk must be 0 or more positions, got {chunk}")
        self.chunk = chunk

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._sum(networks, micro, len(micro["length"])) / micro["length"].sum()
        return loss, {"loss": loss.detach()}

    def weight(self, micro: MicroBatch) -> Tensor:
        return micro["length"].sum()

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        return {
            "loss_sum": self._sum(networks, micro, micro.real).double(),
            "loss_count": micro["length"][: micro.real].sum(),
        }

    def continue_tokens(
        self, networks: Networks, prompt: list[int], count: int, context: int, device: str
    ) -> list[int]:
        tokens = torch.tensor([prompt], device=device)
        tokens = generate(networks.model, tokens, count, max_length=context, temperature=0.8)
        return tokens[0].tolist()

    def _sum(self, networks: Networks, micro: MicroBatch, rows: int) -> Tensor:
        """Of the losses of the real targets in the first `rows` rows."""
        tokens, length = micro["tokens"], micro["length"]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        real = torch.arange(targets.shape[1], device=tokens.device) < length[:, None]  # (B, T)
        real[rows:] = False
        if self.chunk:
            try:
                return networks.model(inputs, targets, real, self.chunk)
            except TypeError as error:
                raise UserError(
                    "objective.chunk: asks the model for model(tokens, targets, weights, chunk) -> sum of losses, which"
                    f" failed: {error}; leave chunk out for a model that gives logits"
                ) from error
        logits = networks.model(inputs)  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses.view_as(targets) * real).sum()
