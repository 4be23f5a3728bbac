"""The engine carries one player's gradients to its weights: plain, DDP, ZeRO or FSDP2.

Its contract is gradients, not losses (docs/decisions/0002): a turn's gradients are either streamed to it, layer by
layer, by the backward of a loss through the live networks, or given to it whole, for losses with a double backward.
Whatever the strategy, the sum over all micro-batches of all ranks is what reaches the weights, so every loss comes in
already weighted by its share of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dist_train.engine.base import Engine, OptimizerMaker, Slice, materialise
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.world import World

__all__ = ["Engine", "OptimizerMaker", "Slice", "make_engine", "materialise"]


def make_engine(
    strategy: Mapping[str, Any],
    player: Player,
    groups: Callable[[list[tuple[str, nn.Parameter]]], list[dict[str, Any]]],
    optimizer: OptimizerMaker,
    world: World,
    *,
    given: bool,
    micro_batches: int,
) -> Engine:
    """Build the engine of one player.

    Args:
        strategy: `{"name": "single" | "ddp" | "zero1" | "zero2" | "zero3" | "fsdp2"}`, and its settings
            (`dist_train.strategies`).
        groups: named parameters -> the optimiser's parameter groups.
        optimizer: parameter groups -> optimiser.
        given: whether this player's gradients are given whole instead of streamed.
        micro_batches: how many micro-batches a rank takes in a step.
    """
    name = strategy["name"]
    if name == "single" and world.size > 1:
        raise UserError(
            f"strategy: single is one process, but there are {world.size} ranks; choose ddp, zero1-3 or fsdp2"
        )
    if name in ("single", "ddp"):
        from dist_train.engine.plain import PlainEngine

        return PlainEngine(player, groups, optimizer, world, given=given)
    if name == "fsdp2":
        from dist_train.engine.fsdp import FsdpEngine

        return FsdpEngine(player, groups, optimizer, world, given, strategy)
    from dist_train.engine.zero import ZeroEngine

    return ZeroEngine(
        player, groups, optimizer, world, given, int(name[-1]), strategy, micro_batches
    )
