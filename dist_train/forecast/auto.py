"""`strategy: auto`: the fastest that fits this machine, resolved before anything is built, alike on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserError
from dist_train.forecast import footprint
from dist_train.forecast.tracing import foresee
from dist_train.strategies import AUTO

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer
    from dist_train.world import World

GIB = 2**30


def resolve(recipe: Recipe, world: World, build: Callable[[Recipe], Trainer]) -> Recipe:
    """The recipe with `auto` replaced by the fastest strategy whose rank fits into this machine's memory (collective).

    Args:
        build: makes a trainer of one process, for a step on fake tensors.
    Raises: UserError where nothing fits.
    """
    if AUTO not in {strategy["name"] for strategy in recipe.strategies.values()}:
        return recipe
    chosen: dict[str, Any] = {}
    if world.is_main:
        try:
            chosen = _choose(recipe, world, build)
        except UserError as error:
            chosen = {"error": str(error)}
    chosen = world.agree(chosen)
    if "error" in chosen:
        raise UserError(f"strategy: auto: {chosen['error']}")
    taken = {p: chosen if s["name"] == AUTO else s for p, s in recipe.strategies.items()}
    logging.getLogger("dist_train").info("strategy: auto is %s", chosen["name"])
    return recipe.set("strategy", chosen if len(taken) == 1 else taken)


def _choose(recipe: Recipe, world: World, build: Callable[[Recipe], Trainer]) -> dict[str, Any]:
    count = recipe.data.global_batch // recipe.data.micro_batch // world.size
    step, _ = foresee(recipe, build)
    limit = rank_limit(world)
    choices = footprint.candidates(recipe, world.size)
    found = footprint.fastest(choices, step, world.size, count, limit)
    if found is None:
        least = sum(footprint.rank_memory(step, choices[-1], world.size, count).values())
        raise UserError(
            f"a rank has {limit / GIB:.1f} GiB, and needs {least / GIB:.1f} under the leanest"
            " strategy; a smaller data.micro_batch, or more ranks (see `dist-train plan`)"
        )
    return found


def rank_limit(world: World) -> float:
    """Bytes that a rank may use: of its GPU, or its share of the memory of this machine."""
    if world.device.startswith("cuda"):
        import torch

        total = torch.cuda.get_device_properties(world.device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    return total * (1 - footprint.RESERVED)
