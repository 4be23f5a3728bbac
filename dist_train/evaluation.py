"""What evaluates a run: its networks in evaluation mode, and the recipe's metrics over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import randomness
from dist_train.faults import faultpoint
from dist_train.metrics import figures
from dist_train.networks import Networks

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


def view(
    run: Trainer,
    weights: str | Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    together: bool = False,
) -> Networks:
    """All networks in evaluation mode, without gradients (collective). `weights`: None or "live" for the present
    ones, the name of a callback that averages them, or whole ones by player and name. `together`: all ranks will
    call them equally often, so that it may be gathered layer by layer."""
    averages: Mapping[str, Mapping[str, Tensor]] = {}
    if isinstance(weights, Mapping):
        averages = weights
    elif weights not in (None, "live"):
        averages = run.callback(weights).weights(run)
    return Networks(
        {
            name: torch.no_grad()(
                run.engines[player].evaluated(name, averages.get(player), together=together)
            )
            for name, player in run.networks.items()
        }
    )


def measure(run: Trainer, weights: str | None = None) -> dict[str, float]:
    """The recipe's metrics over its evaluation split, each sample once, the same on any number of ranks; those of
    further sets as SET/METRIC."""
    networks = run.view(weights, together=True)
    results = _measured(run, networks, run.evaluation, told=True)
    for name, batches in run.evaluation_sets.items():
        found = _measured(run, networks, batches, told=False)
        results |= {f"{name}/{metric}": value for metric, value in found.items()}
    return results


def _measured(run: Trainer, networks: Networks, batches: Any, told: bool) -> dict[str, float]:
    """The metrics over one set; callbacks are told of each batch of the first."""
    for metric in run.metrics.values():
        metric.reset()
    for micro in batches:
        run.leave_if_told()
        run.heartbeat.enter("evaluate")
        micro = micro.to(run.world.device)
        randomness.reseed(run.seed, run.step, randomness.EVALUATION, micro.index)
        with torch.no_grad():
            outputs = run.objective.evaluate(networks, micro)
        for metric in run.metrics.values():
            metric.update(outputs, micro)
        if told:
            run.callbacks.call("evaluation_batch", run, outputs, micro)
        faultpoint("evaluate")
    return figures(run.metrics, run.world)
