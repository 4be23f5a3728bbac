"""Snapshot ensembles: one run of several cycles, the end of each a member."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import checkpoint, components, randomness, schedules
from dist_train.callbacks import Callback
from dist_train.errors import UserError
from dist_train.metrics import figures
from dist_train.objectives import Objective

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class SnapshotEnsemble(Callback):
    """Keeps the checkpoint at the end of each of `cycles` cycles, and evaluates them together at the end of the run
    (Huang et al. 2017, arXiv:1704.00109); the schedule `cyclic_cosine` has the rates of the paper.

    The figures stand in the last row as `evaluate/ensemble/METRIC`; `dist-train ensemble RUN/checkpoints/step-*` takes
    the same members apart.

    Args:
        cycles: in how many equal parts the run falls. last: combine only so many of the last members; all by default.
    """

    priority = 45

    def __init__(self, cycles: int = 5, last: int | None = None) -> None:
        if cycles < 2:
            raise UserError(f"snapshot_ensemble: cycles must be 2 or more, got {cycles}")
        if last is not None and not 1 <= last <= cycles:
            raise UserError(f"snapshot_ensemble: last must be 1 to {cycles} members, got {last}")
        self.cycles, self.count = cycles, last or cycles
        self.members: list[int] = []

    def configure(self, recipe: Recipe) -> None:
        if "checkpoint" not in {spec["name"] for spec in recipe.callback_specs.values()}:
            raise UserError(
                "callbacks.snapshot_ensemble: needs callbacks.checkpoint, which saves the members"
            )
        objective = components.resolve("objective", recipe.objective["name"], "objective.name")
        if recipe.evaluate is not None and objective.combine is Objective.combine:
            raise UserError(
                f"callbacks.snapshot_ensemble: objective '{recipe.objective['name']}' combines no members"
            )

    def run_begins(self, run: Trainer) -> None:
        if run.total_steps < self.cycles:
            raise UserError(
                f"callbacks.snapshot_ensemble.cycles: got {self.cycles}, but the run has {run.total_steps} steps"
            )

        self.ends = set(schedules.cycle_ends(run.total_steps, self.cycles))

    def step_ends(self, run: Trainer) -> None:
        if run.step not in self.ends:
            return
        if run.step not in self.members:  # else an interruption has cut the evaluation short
            self.members.append(run.step)
        if run.step == run.total_steps and run.recipe.evaluate is not None:
            for name, value in self._figures(run).items():
                run.record(f"evaluate/ensemble/{name}", value)

    def kept(self) -> Iterable[int]:
        return self.members

    def state_dict(self) -> dict[str, Any]:
        return {"members": self.members}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.members = list(state["members"])

    def _figures(self, run: Trainer) -> dict[str, float]:
        """The recipe's metrics of the members together, over its evaluation split (collective)."""
        members = [self._outputs(run, step) for step in self.members[-self.count :]]
        for metric in run.metrics.values():
            metric.reset()
        for index, micro in enumerate(run.evaluation):
            micro = micro.to(run.world.device)
            outputs = run.objective.combine([member[index] for member in members], micro)
            for metric in run.metrics.values():
                metric.update(outputs, micro)
        return figures(run.metrics, run.world)

    def _outputs(self, run: Trainer, step: int) -> list[dict[str, Tensor]]:
        """What the member of this step puts out for each of this rank's evaluation batches."""
        networks = run.view(None if step == run.step else _weights(run, step))
        found = []
        for micro in run.evaluation:
            run.leave_if_told()
            run.heartbeat.enter("evaluate")
            micro = micro.to(run.world.device)
            randomness.reseed(run.seed, step, randomness.EVALUATION, micro.index)
            with torch.no_grad():
                found.append(run.objective.evaluate(networks, micro))
        return found


def _weights(run: Trainer, step: int) -> dict[str, dict[str, Tensor]]:
    """Weights and buffers by player of an earlier step, whole."""
    reader = checkpoint.open_whole(checkpoint.at(run.directory.checkpoints, step))
    return {
        player: {
            name: reader.whole(f"{kind}/{name}").to(run.world.device)
            for kind, names in (("weights", engine.names), ("buffers", engine.buffers))
            for name in names
        }
        for player, engine in run.engines.items()
    }
