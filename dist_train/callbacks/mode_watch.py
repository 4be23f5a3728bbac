"""Mode collapse: whether a generator makes all that there is, and nothing else."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.errors import UserError
from dist_train.sample_quality import class_counts, covered_modes, judged, precision_recall

if TYPE_CHECKING:
    from dist_train.data_shards.loader import MicroBatch
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class ModeWatch(Callback):
    """Of every evaluation with a judge: modes covered, precision and recall of the samples; a warning on a collapse.

    A mode is a class of the judge; it is covered when samples have a fifth of the share that it has among the real.
    Precision is the share of samples that lie among the real in the judge's features, recall the share of the real that
    lie among the samples; the same on any number of ranks. In the row: `modes/covered`, `modes/precision`,
    `modes/recall`, and `modes/shares`, of each class among the samples.

    Args:
        neighbours: how far "among" is: to the so many-th nearest neighbour.
        least: warn where a smaller share of the modes is covered.
    """

    def __init__(self, neighbours: int = 3, least: float = 0.8) -> None:
        if neighbours < 1:
            raise UserError(f"neighbours: got {neighbours}, expected 1 or more")
        if not 0 <= least <= 1:
            raise UserError(f"least: got {least}, expected a share from 0 to 1")
        self.neighbours, self.least = neighbours, least
        self._seen: dict[int, list[Tensor]] = {}

    def configure(self, recipe: Recipe) -> None:
        if recipe.evaluate is None or not recipe.objective.get("judge"):
            raise UserError(
                "callbacks.mode_watch: needs an evaluate section and objective.judge, the run directory of a classifier"
            )

    def evaluation_batch(self, run: Trainer, outputs: dict[str, Tensor], micro: MicroBatch) -> None:
        self._seen[micro.index] = [
            judged(outputs, name)[: micro.real].double()
            for name in ("real_features", "features", "real_class", "class")
        ]

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        real, fake, real_class, found = self._gathered(run)
        counts, wanted = (class_counts(one.long()).tolist() for one in (found, real_class))
        modes, there = covered_modes(counts, wanted), sum(count > 0 for count in wanted)
        precision, recall = precision_recall(real, fake, self.neighbours)
        run.record("modes/covered", modes)
        run.record("modes/precision", precision)
        run.record("modes/recall", recall)
        last = max(i for i, pair in enumerate(zip(counts, wanted, strict=True)) if any(pair))
        run.record("modes/shares", [count / len(found) for count in counts[: last + 1]])
        if modes < self.least * there and run.world.is_main:
            logging.getLogger("dist_train").warning(
                "mode collapse: samples cover %d of %d modes at step %d", modes, there, run.step
            )

    def _gathered(self, run: Trainer) -> list[Tensor]:
        """What all ranks have seen, in the order of the split (collective)."""
        seen, self._seen = self._seen, {}
        size = run.evaluation.samples
        section = run.recipe.evaluate
        assert section is not None
        rows = section.micro_batch or run.recipe.data.micro_batch
        whole = [torch.zeros(size, *part.shape[1:]) for part in next(iter(seen.values()))]
        gathered = []
        for number, full in enumerate(whole):
            full = full.double().to(run.world.device)
            for index, parts in seen.items():
                part = parts[number]
                full[index * rows : index * rows + len(part)] = part
            gathered.append(run.world.sum_(full))
        return gathered
