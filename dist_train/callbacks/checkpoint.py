"""Checkpoints on their schedule, and which of them to keep."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from dist_train import checkpoint
from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


class CheckpointCallback(Callback):
    """Save every so often, at the end, and at each new best; keep the last few, the best, and what callbacks keep.

    Args:
        every: "500 steps", "1 epoch", ...; besides, the end and each new best are always saved.
        keep: how many of the newest to keep. An old one goes only after a newer one is whole on disk.
    """

    priority = 90

    def __init__(self, every: str = "1 epoch", keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"checkpoint: keep must be at least 1, got {keep}")
        self.every, self.keep = every, keep

    def run_begins(self, run: Trainer) -> None:
        self.keepers = [one for one in run.callbacks if type(one).kept is not Callback.kept]

    def step_ends(self, run: Trainer) -> None:
        kept: set[int | None] = {step for callback in self.keepers for step in callback.kept()}
        kept.add(run.best.get("step"))
        if run.every(self.every) or run.is_last or run.step in kept:
            run.save()
            if run.world.is_main:
                self._prune(run, kept)

    def _prune(self, run: Trainer, kept: set[int | None]) -> None:
        folder = run.directory.checkpoints
        # later ones are damaged: the run has gone on from before them
        taken = [step for step in checkpoint.steps(folder) if step <= run.step]
        for step in taken[: -self.keep]:
            if step not in kept and not checkpoint.problems(checkpoint.at(folder, run.step)):
                doomed = folder / f".deleting-{step:08d}"
                checkpoint.at(folder, step).rename(
                    doomed
                )  # at once: never a half-deleted checkpoint by its name
                shutil.rmtree(doomed)
