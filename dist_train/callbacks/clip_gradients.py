"""Gradient clipping, decided here and done by the engine, which knows how the gradients are sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.trainer import Trainer


class ClipGradients(Callback):
    """Clip by the global norm (direction kept; Pascanu et al. 2013), or each entry into [-value, value].

    Args:
        norm: largest global norm. value: largest absolute entry. One of the two.
        players: whose gradients; all players by default.
    """

    priority = 10

    def __init__(
        self,
        norm: float | None = None,
        value: float | None = None,
        players: list[str] | None = None,
    ) -> None:
        if (norm is None) == (value is None):
            raise UserError("clip_gradients: give norm or value, one of the two")
        bound = norm if norm is not None else value
        if not isinstance(bound, int | float) or not 0 < bound < float("inf"):
            raise UserError(f"clip_gradients: expected a positive number, got {bound!r}")
        self.norm, self.value, self.players = norm, value, players

    def gradients_ready(self, run: Trainer, turn: Turn) -> None:
        if self.players is None or turn.player in self.players:
            run.engines[turn.player].clip(norm=self.norm, value=self.value)
