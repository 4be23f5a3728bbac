"""Units that have died: no gradient reaches their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dist_train.callbacks import Callback

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.trainer import Trainer

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose rows of weights are units."""


class DeadUnits(Callback):
    """Records `dead_units`: of the layer where it is largest, the share of units without gradient from a whole batch.

    A ReLU unit that is 0 for every sample passes no gradient on, so that of its weights is exactly 0. Gathers all
    gradients: each time costs about as much as reducing them.

    Args:
        every: how often, as "100 steps".
    """

    priority = 2  # before the gradients are clipped

    def __init__(self, every: str = "100 steps") -> None:
        self.every = every

    def run_begins(self, run: Trainer) -> None:
        self.names = {
            player: {
                f"{name}.weight"
                for name, module in engine.player.networks.named_modules()
                if isinstance(module, LAYERS)
            }
            for player, engine in run.engines.items()
        }

    def gradients_ready(self, run: Trainer, turn: Turn) -> None:
        if not run.every(self.every):
            return
        gradients = run.engines[turn.player].full_gradients()
        shares = [
            (gradient.flatten(1) == 0).all(dim=1).double().mean().item()
            for name, gradient in gradients.items()
            if name in self.names[turn.player]
        ]
        run.record(run.named(turn.player, "dead_units"), max(shares, default=0.0))
