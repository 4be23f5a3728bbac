"""Look at what a CycleGAN makes of pictures: both ways, beside what they are to become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.data_shards.loader import MicroBatch
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

COLUMNS = 8


class Translations(Callback):
    """The first pictures of each evaluation in `samples/`: 8 of domain a, what becomes of them, 8 of b, what becomes of
    those; and so on, 16 of each, or what the first micro-batch has."""

    def __init__(self) -> None:
        self._grid: Tensor | None = None

    def configure(self, recipe: Recipe) -> None:
        if recipe.evaluate is None:
            raise UserError("callbacks.translations: needs an evaluate section")

    def evaluation_batch(self, run: Trainer, outputs: dict[str, Tensor], micro: MicroBatch) -> None:
        if micro.index != 0:
            return
        rows = []
        for start in range(0, min(2 * COLUMNS, micro.real), COLUMNS):
            shown = slice(start, min(start + COLUMNS, micro.real))
            pairs = ((micro["a.image"], outputs["to_b"]), (micro["b.image"], outputs["to_a"]))
            rows += [x[shown] for pair in pairs for x in pair]
        self._grid = (torch.cat(rows) + 1) / 2

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        grid, self._grid = self._grid, None  # the first micro-batch is rank 0's, which alone writes
        run.images("translations", grid, "a, as b, b, as a")
