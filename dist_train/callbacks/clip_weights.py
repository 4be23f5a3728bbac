"""Weights kept within a bound: how the first Wasserstein GAN makes its critic Lipschitz (arXiv:1701.07875)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_train.callbacks import Callback
from dist_train.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.objectives import Turn
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class ClipWeights(Callback):
    """After each of its turns every weight of these players is clipped into [-bound, bound], on the slices of its rank.

    Args:
        bound: larger than 0. players: whose weights.
    """

    priority = 10

    def __init__(self, bound: float, players: list[str]) -> None:
        if bound <= 0:
            raise UserError(f"bound: got {bound}, expected a number above 0")
        self.bound, self.players = bound, players

    def configure(self, recipe: Recipe) -> None:
        for player in self.players:
            if player not in recipe.players:
                raise UserError(
                    f"callbacks.clip_weights.players: no player is called '{player}'"
                    f"{nearest(player, recipe.players)} (there are {', '.join(recipe.players)})"
                )

    def turn_ends(self, run: Trainer, turn: Turn) -> None:
        if turn.player in self.players:
            run.engines[turn.player].project(self._clip)

    def _clip(self, weights: Tensor) -> None:
        weights.clamp_(-self.bound, self.bound)
