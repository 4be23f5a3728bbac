"""Classification: the negative log-likelihood of the right class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.ensembles import combined_log_probability
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class Classification(Objective):
    """Cross-entropy of `model(image) -> logits (B, K)` against `label` (B,).

    A model with members gives (B, M, K): the loss is the sum of theirs, and they are evaluated together.

    Args:
        label_smoothing: s: the target is 1 - s for the right class plus s / K for each (Szegedy et al. 2016, sec. 7).
        mixup: alpha > 0 blends each image with another of its micro-batch, share ~ Beta(alpha, alpha), and their
            losses alike (Zhang et al. 2018, arXiv:1710.09412). 0 for none.
        cutmix: alpha > 0 pastes a rectangle of another image instead (Yun et al. 2019, arXiv:1905.04899).
            With both, each micro-batch gets one of the two.
        inputs: the field that the model sees. Of `tokens` it also sees how many a row has: `model(tokens, length)`.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        inputs: str = "image",
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if mixup < 0.0 or cutmix < 0.0:
            raise ValueError(f"mixup and cutmix are 0 or more, got {mixup} and {cutmix}")
        if inputs == "tokens" and (mixup or cutmix):
            raise ValueError("mixup and cutmix blend pictures, expected 0 where inputs is tokens")
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.inputs = inputs

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        label = micro["label"]
        if self.mixup == self.cutmix == 0.0:
            loss, members = self._cross_entropy(self._logits(networks, micro), label)
        else:
            x = micro[self.inputs]
            other = torch.randperm(len(x), device=x.device)  # (B,): whom each is mixed with
            x, share = self._mixed(x, x[other])
            logits = networks.model(x)
            one, members = self._cross_entropy(logits, label)
            two, _ = self._cross_entropy(logits, label[other])
            loss = share * one + (1 - share) * two
        mean = loss.detach() if members == 1 else loss.detach() / members
        return loss, {"loss": mean}

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        probability = self._logits(networks, micro).softmax(dim=-1)
        if probability.ndim == 3:  # (B, M, K)
            probability = probability.mean(dim=1)
        return {"class": probability.argmax(dim=-1), "probability": probability}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        members = self.evaluate_members(networks, micro)
        return members[0] if len(members) == 1 else self.combine(members, micro)

    def evaluate_members(self, networks: Networks, micro: MicroBatch) -> list[dict[str, Tensor]]:
        logits = self._logits(networks, micro)
        each = logits.unbind(dim=1) if logits.ndim == 3 else (logits,)
        return [_judged(one, micro) for one in each]

    def combine(
        self, outputs: Sequence[dict[str, Tensor]], micro: MicroBatch, how: str = "mean"
    ) -> dict[str, Tensor]:
        logits = torch.stack([one["logits"] for one in outputs])  # (M, B, K)
        return _judged(combined_log_probability(logits.double().log_softmax(dim=-1), how), micro)

    def _logits(self, networks: Networks, micro: MicroBatch) -> Tensor:
        x = micro[self.inputs]
        if self.inputs == "tokens":
            return networks.model(
                x, micro["length"] + 1
            )  # the last one, target of others, is read too
        return networks.model(x)

    def _cross_entropy(self, logits: Tensor, label: Tensor) -> tuple[Tensor, int]:
        """The mean over the rows, of members (B, M, K) summed over them, and how many members there are.

        Labels are (B,), or (B, M) where each member has rows of its own.
        """
        members = logits.shape[1] if logits.ndim == 3 else 1
        if logits.ndim == 3:
            label = label if label.ndim == 2 else label[:, None].expand(-1, members)
            logits, label = logits.flatten(0, 1), label.flatten()
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        return loss if members == 1 else members * loss, members

    def _mixed(self, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
        """The mixed images, and the share of each that is its own. The draws are the CPU's: no rank has to wait."""
        cut = self.cutmix > 0.0 and (self.mixup == 0.0 or torch.rand(()).item() < 0.5)
        alpha = torch.tensor(self.cutmix if cut else self.mixup)
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        return cutmix(x, other, share, torch.rand(2)) if cut else (mixup(x, other, share), share)


def _judged(logits: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """What metrics need of logits (B, K)."""
    losses = F.cross_entropy(logits, micro["label"], reduction="none")
    return {
        "logits": logits,
        "nll": losses,
        "loss_sum": losses[: micro.real].double().sum(),
        "loss_count": losses.new_tensor(micro.real),
    }


def mixup(x: Tensor, other: Tensor, share: float) -> Tensor:
    """share x + (1 - share) other."""
    return share * x + (1 - share) * other


def cutmix(x: Tensor, other: Tensor, share: float, place: Tensor) -> tuple[Tensor, float]:
    """Paste a rectangle of `other` (B, C, H, W), 1 - share of the area, centred at `place` (2,) in [0, 1), into x.

    Returns the images and the share that is left of x, which is more than `share` where an edge cuts the rectangle.
    """
    height, width = x.shape[-2:]
    side = (1 - share) ** 0.5
    (top, bottom), (left, right) = (
        _span(size, side, centre)
        for size, centre in zip((height, width), place.tolist(), strict=True)
    )
    x = x.clone()
    x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / (height * width)


def _span(size: int, side: float, centre: float) -> tuple[int, int]:
    """The pixels [first, last) of a side of the rectangle that lie in the image."""
    length, middle = int(size * side), int(size * centre)
    first = middle - length // 2
    return max(first, 0), min(first + length, size)
