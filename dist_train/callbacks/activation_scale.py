"""The scale of activations and gradients by depth, as plots: does the initialisation fit the network?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import randomness
from dist_train.callbacks import Callback
from dist_train.networks import Networks
from dist_train.pictures import plots
from dist_train.run_directory import write_file

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class ActivationScale(Callback):
    """Standard deviations of what every layer puts out, and of the loss's gradient there, layer by layer.

    Before step 0 and every so often, on the step's first micro-batch and its own draws; nothing of the run changes.
    Written as `plots/activation-scale-PLAYER-STEP.png` and `.json`.

    Args:
        every: how often, as "1 epoch".
    """

    priority = 15  # when the scalars of the step are set

    def __init__(self, every: str = "1 epoch") -> None:
        self.every = every

    def configure(self, recipe: Recipe) -> None:
        plots.need_matplotlib("callbacks.activation_scale")

    def step_begins(self, run: Trainer) -> None:
        if run.step == 0 or run.every(self.every):
            for turn in run.objective.turns(run.step):
                self._draw(run, turn.player, self._measure(run, turn))

    def _measure(self, run: Trainer, turn: Turn) -> dict[str, dict[str, float]]:
        """{layer: {"activation", "gradient"}} in order of depth; on all ranks, as views may need collectives."""
        outputs: dict[str, list[Tensor]] = {}

        def seen(layer: str, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                outputs.setdefault(layer, []).append(output)

        views = run.engines[turn.player].views
        calls = {name: run.seen_by(turn)[name] for name in run.seen_by(turn)}
        for name in run.recipe.networks[turn.player]:
            calls[name] = views.observed(name, seen)
        micro = min(run.batch, key=lambda micro: micro.index)
        randomness.reseed(run.seed, run.step, turn.index, micro.index)
        loss, _ = run.objective.loss(turn, Networks(calls), micro, run.scalars)
        every = [output for of_layer in outputs.values() for output in of_layer]
        gradients = iter(torch.autograd.grad(loss, every, materialize_grads=True))
        return {
            layer: {
                "activation": _deviation(of_layer),
                "gradient": _deviation([next(gradients) for _ in of_layer]),
            }
            for layer, of_layer in outputs.items()
        }

    def _draw(self, run: Trainer, player: str, scales: dict[str, dict[str, float]]) -> None:
        if not run.world.is_main:
            return
        file = run.directory.plots / f"activation-scale-{player}-{run.step:08d}"
        write_file(file.with_suffix(".json"), json.dumps(scales, indent=2).encode())
        depth = list(range(1, len(scales) + 1))
        panels = [
            (f"std of the {kind}", {player: (depth, [layer[kind] for layer in scales.values()])})
            for kind in ("activation", "gradient")
        ]
        plots.line_plot(file.with_suffix(".png"), panels, x_label="layer", log_y=True)


def _deviation(parts: list[Tensor]) -> float:
    return float(torch.cat([part.detach().float().flatten() for part in parts]).std())
