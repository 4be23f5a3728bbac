"""Exact likelihood of images, one sub-pixel after the other (van den Oord et al. 2016, arXiv:1601.06759)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError, nearest
from dist_train.models.subpixels import place_of
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.objectives.judge import Judge
from dist_train.objectives.likelihoods import LEVELS, level_of

CONTEXTS = ("none", "image", "upper_half")
COLUMNS = 8
"""Of a grid of completions; each column begins alike."""


class Autoregression(Objective):
    """`model(x (B, C, H, W), condition) -> logits (B, V, C, H, W)`; log p(x) = sum of log p(x_i | x_1 ... x_(i-1)).

    The loss is -log p(x) / D, nats a sub-pixel. Condition: nothing, the label (B,), or a context: what a second network
    of the same player, `encoder(image) -> (B, K)`, makes of the image or of its upper half.

    An evaluation with a judge draws a sample for each image, under its condition, and gives the features that this
    classifier sees in both, (B, F), and the class that it takes the sample for, (B,), as a GAN's does.

    Args:
        shape: that of a sample, as [1, 28, 28].
        levels: V, 2 to 256: level k of 256 becomes k V / 256, rounded down. Bits are those of these levels.
        num_classes: the model takes the label; 0: it does not. context: `none`, `image` or `upper_half`.
        judge: the run directory of a classifier; from the recipe's project root on.
    """

    scale = "unit"

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = LEVELS,
        num_classes: int = 0,
        context: str = "none",
        judge: str | None = None,
        root: Path | None = None,
    ) -> None:
        if not 2 <= levels <= LEVELS:
            raise UserError(f"levels: got {levels}, expected 2 to {LEVELS}")
        if len(shape) != 3:
            raise UserError(f"shape: got {list(shape)}, expected channels, height and width")
        if num_classes < 0:
            raise UserError(f"num_classes: got {num_classes}, expected 0 (no labels) or more")
        if context not in CONTEXTS:
            raise UserError(
                f"context: got '{context}', expected one of {', '.join(CONTEXTS)}{nearest(context, CONTEXTS)}"
            )
        if num_classes and context != "none":
            raise UserError(f"context: got '{context}' with num_classes, expected one condition")
        self.shape, self.levels = tuple(shape), levels
        self.num_classes, self.context = num_classes, context
        self._judge = Judge((root or Path.cwd()) / Path(judge).expanduser()) if judge else None

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = self._quantised(micro["image"])
        loss = self._nll(networks, x, self._condition(networks, x, micro)).mean()
        return loss, {"loss": loss.detach(), "bits_per_dim": loss.detach() / math.log(2)}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        x = self._quantised(micro["image"])
        condition = self._condition(networks, x, micro)
        nll = self._nll(networks, x, condition)  # (B,), a sub-pixel
        outputs = {
            "nll": nll * math.prod(self.shape),
            "bits_per_dim": nll / math.log(2),
            "loss_sum": nll[: micro.real].double().sum(),
            "loss_count": nll.new_tensor(micro.real),
        }
        if self._judge is not None:
            drawn = self._drawn(networks, torch.zeros_like(x), condition, 0)
            outputs["real_features"], outputs["real_class"] = self._judge(x)
            outputs["features"], outputs["class"] = self._judge(drawn)
        return outputs

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        if self.num_classes:
            raise UserError("objective.num_classes: a likelihood given the label needs the label")
        x = self._quantised(micro["image"])
        nll = self._nll(networks, x, self._condition(networks, x, micro))
        return {"log_likelihood": -nll * math.prod(self.shape)}

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        if self.context != "none":
            return {}
        rows = torch.arange(count, device=device)
        condition = rows % self.num_classes if self.num_classes else None
        blank = torch.zeros(count, *self.shape, device=device)
        return {"samples": self._drawn(networks, blank, condition, 0)}

    def completions(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        """Up to 8 images of the micro-batch, and below each what its upper half goes on with, 7 times. With the image
        as context nothing else is kept of it."""
        x = self._quantised(micro["image"])
        condition = self._condition(networks, x, micro)
        columns = min(COLUMNS, micro.real)
        again = torch.arange(columns, device=x.device).repeat(max(1, columns - 1))
        if condition is not None:
            condition = condition[again]
        channels, height, width = self.shape
        known = 0 if self.context == "image" else channels * (height // 2) * width
        drawn = self._drawn(networks, x[again], condition, known)
        return {"completions": torch.cat([x[:columns], drawn])}

    def _quantised(self, x: Tensor) -> Tensor:
        """Of the 256 levels k / 255 the V levels j / (V - 1)."""
        if x.shape[1:] != self.shape:
            raise UserError(
                f"objective.shape: got {list(self.shape)}, but samples are {list(x.shape[1:])}"
            )
        return (level_of(x) * self.levels // LEVELS) / (self.levels - 1)

    def _condition(self, networks: Networks, x: Tensor, micro: MicroBatch) -> Tensor | None:
        if self.num_classes:
            return micro["label"]
        if self.context == "none":
            return None
        if self.context == "upper_half":
            upper = torch.arange(x.shape[2], device=x.device) < x.shape[2] // 2
            x = x * upper[:, None]
        return networks.encoder(x)

    def _nll(self, networks: Networks, x: Tensor, condition: Tensor | None) -> Tensor:
        """-log p(x) / D of each image, in nats: (B, C, H, W) -> (B,)."""
        logits = networks.model(x, condition)
        if logits.shape[1] != self.levels:
            raise UserError(
                f"objective.levels: got {self.levels}, but the model gives {logits.shape[1]}"
            )
        level = (x * (self.levels - 1)).round().long()
        return F.cross_entropy(logits, level, reduction="none").flatten(1).mean(dim=1)

    def _drawn(self, networks: Networks, x: Tensor, condition: Tensor | None, known: int) -> Tensor:
        return draw_after(networks.model, x, condition, known, self.levels)


@torch.no_grad()
def draw_after(
    model: Callable[..., Any], x: Tensor, condition: Tensor | None, known: int, levels: int
) -> Tensor:
    """Images (B, C, H, W) in [0, 1] whose first `known` sub-pixels stay, and the others are drawn one after the other,
    each given those before it, from the default generator."""
    x, state = x.clone(), dict[str, Any]()
    for number in range(known, x[0].numel()):
        logits, state = model(x, condition, number, state)  # (B, V)
        level = torch.multinomial(logits.float().softmax(dim=1), num_samples=1).squeeze(1)
        row, column, channel = place_of(number, x.shape)
        x[:, channel, row, column] = level / (levels - 1)
    return x
