"""Gradient clipping, decided here and done by the engine, which knows how the gradients are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.trainer import Trainer

KEPT = 1000
"""Norms of so many turns are remembered for a suggestion."""
SHARE = 0.95
"""The suggested bound would have left so many of them as they were."""


class ClipGradients(Callback):
    """Clip by the global norm (direction kept; Pascanu et al. 2013), or each entry into [-value, value].

    With `suggest` the rows show a bound for the norm that would act on one turn in 20 (of the last 1,000), and the
    share of turns that the present bound acted on; `clip_gradients: {suggest: true}` alone only watches. Watching
    changes nothing of the run.

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
        suggest: bool = False,
    ) -> None:
        if (norm is not None) + (value is not None) != 1 and not (
            suggest and norm is value is None
        ):
            raise UserError("clip_gradients: give norm or value, one of the two, or suggest: true")
        for bound in (norm, value):
            if bound is None:
                continue
            if not isinstance(bound, int | float) or not 0 < bound < float("inf"):
                raise UserError(f"clip_gradients: expected a positive number, got {bound!r}")
        self.norm, self.value, self.players, self.suggest = norm, value, players, suggest
        self.norms: dict[str, list[float]] = {}
        self.unread: dict[str, list[Tensor]] = {}

    def gradients_ready(self, run: Trainer, turn: Turn) -> None:
        if self._concerns(turn.player) and (self.norm or self.value):
            run.engines[turn.player].clip(norm=self.norm, value=self.value)

    def turn_ends(self, run: Trainer, turn: Turn) -> None:
        if self.suggest and self._concerns(turn.player):
            self.unread.setdefault(turn.player, []).append(run.engines[turn.player].norm)

    def step_ends(self, run: Trainer) -> None:
        if self.suggest and (run.every(run.recipe.log.every) or run.is_last):
            self._read()
            for player, norms in self.norms.items():
                bound = torch.tensor(norms, dtype=torch.float64).quantile(SHARE)
                run.record(run.named(player, "suggested_norm"), float(bound))
                if self.norm is not None:
                    clipped = sum(norm > self.norm for norm in norms) / len(norms)
                    run.record(run.named(player, "share_clipped"), clipped)

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"norms": self.norms} if self.suggest else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = {player: list(norms) for player, norms in state.get("norms", {}).items()}

    def _concerns(self, player: str) -> bool:
        return self.players is None or player in self.players

    def _read(self) -> None:
        """Bring the norms to the host, together."""
        for player, unread in self.unread.items():
            norms = self.norms.get(player, []) + torch.stack(unread).double().tolist()
            self.norms[player] = norms[-KEPT:]
        self.unread = {}
