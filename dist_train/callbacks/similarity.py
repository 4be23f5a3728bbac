"""How alike the layers of a network represent the samples, as plots: similarity matrices, and CKA between layers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import randomness
from dist_train.callbacks import Callback
from dist_train.diagnose.representations import cka, similarity
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.pictures import plots
from dist_train.run_directory import write_file

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

SHOWN = 7
"""Layers with a map of their own in the plot, from the first to the last."""


class Similarity(Callback):
    """The representational similarity matrix of each layer with a weight, over the first micro-batch of the evaluation
    split, sorted by label where there are labels; and linear CKA between any two layers.

    Before step 0, every so often and at the end. Written as `plots/similarity-STEP.png` and `.json`.

    Args:
        every: how often, as "1 epoch".
    """

    priority = 70

    def __init__(self, every: str = "1 epoch") -> None:
        self.every = every

    def configure(self, recipe: Recipe) -> None:
        plots.need_matplotlib("callbacks.similarity")
        if recipe.evaluate is None:
            raise UserError(
                "callbacks.similarity: needs an evaluate section, whose first micro-batch it looks at"
            )

    def run_begins(self, run: Trainer) -> None:
        if run.step == 0:
            self._draw(run)

    def step_ends(self, run: Trainer) -> None:
        if run.every(self.every) or run.step == run.total_steps:
            self._draw(run)

    def _draw(self, run: Trainer) -> None:
        for engine in run.engines.values():
            _ = engine.views.weights  # gathered by all ranks; the rest is rank 0's
        if not run.world.is_main:
            return
        layers = self._representations(run)
        names = list(layers)
        likeness = [[cka(a, b) for b in layers.values()] for a in layers.values()]
        file = run.directory.plots / f"similarity-{run.step:08d}"
        write_file(
            file.with_suffix(".json"), json.dumps({"layers": names, "cka": likeness}).encode()
        )
        spread = {round(i * (len(names) - 1) / (SHOWN - 1)) for i in range(SHOWN)}
        maps = [(names[i], similarity(layers[names[i]]).tolist()) for i in sorted(spread)]
        plots.heat_maps(file.with_suffix(".png"), [*maps, ("CKA between layers", likeness)])

    def _representations(self, run: Trainer) -> dict[str, Tensor]:
        """{layer: (B, F)} in order of depth, in evaluation mode, float64 on the CPU."""
        micro = next(iter(run.evaluation)).to(run.world.device)
        found: dict[str, Tensor] = {}

        def seen(layer: str, output: Any) -> None:
            if isinstance(output, Tensor) and len(output) == len(micro.ids):
                found.setdefault(layer, output[: micro.real].flatten(1).double().cpu())

        calls = {}
        for player, engine in run.engines.items():
            for name in run.recipe.networks[player]:
                calls[name] = engine.views.observed(name, seen, evaluating=True)
        randomness.reseed(run.seed, run.step, randomness.EVALUATION, 0)
        with torch.no_grad():
            run.objective.evaluate(Networks(calls), micro)
        if "label" in micro.tensors:
            order = micro["label"][: micro.real].argsort(stable=True).cpu()
            found = {layer: x[order] for layer, x in found.items()}
        return found
