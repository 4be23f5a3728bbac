"""The singular values of every matrix of weights over training, as numbers and plots."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.diagnose.representations import effective_rank
from dist_train.errors import UserError
from dist_train.pictures import plots
from dist_train.run_directory import write_file

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

SHOWN = 6
"""Matrices with a panel of their own in the plot, from the first to the last."""
PRODUCT = "product"


class SingularValues(Callback):
    """The largest singular values of every trained matrix, before step 0, every so often and at the end; a convolution
    counts as (out, in x kernel). The row gets `effective_rank/MATRIX`.

    Written as `plots/singular-values-PLAYER.json` and, when the run ends, `.png`.

    Args:
        every: how often, as "1 epoch".
        count: how many of the largest to keep.
        product: also of the product of all matrices: the one map that a deep linear network is.
    """

    priority = 70  # before the row is written

    def __init__(self, every: str = "1 epoch", count: int = 10, product: bool = False) -> None:
        if count < 1:
            raise UserError(f"count: must be at least 1, got {count}")
        self.every, self.count, self.product = every, count, product
        self.steps: list[int] = []
        self.values: dict[str, dict[str, list[list[float]]]] = {}

    def configure(self, recipe: Recipe) -> None:
        plots.need_matplotlib("callbacks.singular_values")

    def run_begins(self, run: Trainer) -> None:
        if run.step == 0:
            self._measure(run)

    def step_ends(self, run: Trainer) -> None:
        if run.every(self.every) or run.step == run.total_steps:
            for name, rank in self._measure(run).items():
                run.record(f"effective_rank/{name}", rank)

    def run_ends(self, run: Trainer) -> None:
        if not run.world.is_main:
            return
        for player, matrices in self.values.items():
            names = list(matrices)
            spread = {round(i * (len(names) - 1) / (SHOWN - 1)) for i in range(SHOWN)}
            panels = [
                (
                    f"{name}",
                    {
                        str(mode + 1): (self.steps, list(curve))
                        for mode, curve in enumerate(zip(*matrices[name], strict=True))
                    },
                )
                for name in (names[i] for i in sorted(spread))
            ]
            file = run.directory.plots / f"singular-values-{player}.png"
            plots.line_plot(file, panels, x_label="step")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.values = list(state["steps"]), dict(state["values"])

    def _measure(self, run: Trainer) -> dict[str, float]:
        """Effective ranks by name, on every rank; the values into the file."""
        ranks = {}
        self.steps.append(run.step)
        for player, engine in run.engines.items():
            whole = run.full_weights(player)
            matrices = {
                name.removesuffix(".weight"): whole[name].flatten(1)
                for name in engine.trained
                if whole[name].ndim >= 2
            }
            if self.product:
                matrices = {PRODUCT: product(matrices), **matrices}
            kept = self.values.setdefault(player, {})
            for name, matrix in matrices.items():
                values = torch.linalg.svdvals(matrix.float())
                kept.setdefault(name, []).append(values[: self.count].tolist())
                ranks[run.named(player, name)] = effective_rank(values.double())
            if run.world.is_main:
                found = {"steps": self.steps, "singular_values": kept}
                file = run.directory.plots / f"singular-values-{player}.json"
                write_file(file, json.dumps(found).encode())
        return ranks


def product(matrices: Mapping[str, Tensor]) -> Tensor:
    """W_L ... W_2 W_1 of matrices in the order of the forward. UserError: one does not take what the last gives."""
    for (before, first), (after, second) in zip(
        list(matrices.items())[:-1], list(matrices.items())[1:], strict=True
    ):
        if second.shape[1] != first.shape[0]:
            raise UserError(
                f"callbacks.singular_values.product: {before} gives {first.shape[0]} and {after} takes"
                f" {second.shape[1]}: a product is for a chain of linear layers, such as mlp"
            )
    return functools.reduce(lambda first, second: second @ first, matrices.values())
