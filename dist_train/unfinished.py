"""A step whose turns are through and whose callbacks are not: an interruption has cut an evaluation or samples short.

The weights are those after the step, so the step is saved; with it goes what the callbacks from the one that was cut
short on need, for the next start to call their `step_ends` as if nothing had been. So an evaluation is done again from
its beginning, and its row, which an unfinished evaluation must not write, is written then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


def record(run: Trainer, callback: str) -> dict[str, Any]:
    """What a checkpoint holds of a step that stopped in `callback.step_ends` (collective): JSON values."""
    order = list(run.callbacks.by_name)
    logged = order.index(callback) > order.index("journal")
    return {
        "callback": callback,
        "last_row": run.step if logged else run.step - 1,
        "row": run.row,
        "scalars": run.scalars,
        "losses": {
            player: run.world.sum_(loss.detach().double().clone()).item()
            for player, loss in run.losses.items()
        },
        "engines": {
            player: {
                "norm": engine.norm.item(),
                "learning_rates": [group["lr"] for group in engine.param_groups],
            }
            for player, engine in run.engines.items()
        },
    }


def restore(run: Trainer, unfinished: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the run what it was within that step; returns this rank's share of its losses: rank 0 carries them."""
    run.row, run.scalars = dict(unfinished["row"]), dict(unfinished["scalars"])
    device = run.world.device
    for player, values in unfinished["engines"].items():
        engine = run.engines[player]
        engine.norm = torch.tensor(values["norm"], device=device)
        for group, rate in zip(engine.param_groups, values["learning_rates"], strict=True):
            group["lr"] = rate
    return {
        player: torch.tensor(loss if run.world.is_main else 0.0, device=device)
        for player, loss in unfinished["losses"].items()
    }
