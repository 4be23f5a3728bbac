"""Metrics: one value a sample; dist-train averages over the split and over the ranks."""

from collections.abc import Mapping

from torch import Tensor

from dist_train.data_shards.loader import MicroBatch


def top_two(outputs: Mapping[str, Tensor], micro: MicroBatch) -> Tensor:
    """Whether the label (B,) is among the two largest of `logits` (B, K)."""
    best = outputs["logits"].topk(2, dim=1).indices
    return (best == micro["label"].unsqueeze(1)).any(dim=1).double()
