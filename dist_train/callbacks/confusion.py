"""Which class is taken for which: counted over each evaluation, as a table in the row and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.data_shards.loader import MicroBatch
    from dist_train.trainer import Trainer

PIXELS = 12
"""Of a cell of the picture."""


class Confusion(Callback):
    """The confusion matrix of every evaluation: row i, column j: how many of class i were taken for class j.

    The counts stand in the row as `confusion`, for the report's table; in the picture a row is divided by its sum and
    white is 0. For objectives that give `logits` (b, K) and data with a `label`.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def evaluation_batch(self, run: Trainer, outputs: dict[str, Tensor], micro: MicroBatch) -> None:
        if "logits" not in outputs:
            raise UserError("callbacks.confusion: this objective tells no classes apart")
        logits, label = outputs["logits"][: micro.real], micro["label"][: micro.real]
        classes = logits.shape[1]
        pairs = label * classes + logits.argmax(dim=1)
        counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self._counts = counts if self._counts is None else self._counts + counts

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        assert self._counts is not None, "an evaluation has at least one micro-batch a rank"
        counts = run.world.sum_(self._counts.double())
        self._counts = None
        run.record("confusion", counts.long().tolist())
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        cells = (1 - shares).repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
        run.images("confusion", cells[None, None], "true class down, predicted class across")
