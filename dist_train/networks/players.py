"""The networks of a run as its recipe wants them to run: precision, layout, recomputation, compilation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from dist_train.errors import UserError
from dist_train.networks import Player, placement
from dist_train.networks.batch_norm import check_groups, synchronise
from dist_train.networks.blocks import (
    chosen,
    compile_forward,
    recompute_activations,
    repeated_blocks,
)
from dist_train.networks.precision import check_device

if TYPE_CHECKING:
    from torch import nn

    from dist_train.recipe import Recipe
    from dist_train.world import World


def make_players(
    networks: Mapping[str, Mapping[str, nn.Module]],
    recipe: Recipe,
    world: World,
    given: Collection[str],
) -> dict[str, Player]:
    """Players by name. Raises UserError for a setting that a player, strategy or device cannot have.

    Args:
        networks: {player: {network: module}}. given: players whose gradients are given whole.
    """
    device = world.device.partition(":")[0]
    _check_owners(networks)
    by_name = {name: module for modules in networks.values() for name, module in modules.items()}
    for module in by_name.values():
        check_device(recipe.precision, module, device)
    if recipe.batch_norm == "synchronised":
        check_groups(world, recipe.data.global_batch, recipe.data.micro_batch)
        for module in by_name.values():
            synchronise(module, world)
    if recipe.activation_checkpointing is not None:
        where = "activation_checkpointing"
        found = (
            repeated_blocks(by_name, where)
            if recipe.activation_checkpointing == "auto"
            else chosen(by_name, recipe.activation_checkpointing, where)
        )
        for modules in found.values():
            for module in modules:
                recompute_activations(module)
    if recipe.compile:
        _compile(networks, by_name, recipe, given)
    for module in by_name.values():
        placement.check(module, recipe.placement)
    return {
        player: Player(
            modules,
            recipe.precision,
            device,
            recipe.channels_last,
            recipe.placement,
            cuda_graphs=recipe.compile == "cuda_graphs",
        )
        for player, modules in networks.items()
    }


def _check_owners(networks: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """A weight has one player, which alone updates it; the others see it through a frozen view."""
    owners: dict[int, str] = {}
    for player, modules in networks.items():
        for name, module in modules.items():
            for path, parameter in module.named_parameters():
                owner = owners.setdefault(id(parameter), player)
                if owner != player:
                    raise UserError(
                        f"model.{player}: {name}.{path} is a weight of '{owner}' too, but a weight has one player;"
                        " make the shared module a network of its own, in the player that is to train it"
                    )


def _compile(
    networks: Mapping[str, Mapping[str, nn.Module]],
    by_name: Mapping[str, nn.Module],
    recipe: Recipe,
    given: Collection[str],
) -> None:
    if recipe.activation_checkpointing is not None:
        raise UserError(
            "compile: not together with activation_checkpointing; choose one of the two"
        )
    cuda_graphs = recipe.compile == "cuda_graphs"
    found = (
        chosen(by_name, recipe.compile, "compile")
        if isinstance(recipe.compile, list)
        else {name: [module] for name, module in by_name.items()}
    )
    for player, modules in networks.items():
        wanted = [module for name in modules for module in found[name]]
        if wanted and player in given:
            raise UserError(
                f"compile: the gradients of '{player}' are given, from a double backward, which torch.compile has not"
            )
        strategy = recipe.strategies[player]["name"]
        if cuda_graphs and strategy not in ("single", "ddp"):
            raise UserError(
                f"compile: cuda_graphs read weights always from the same memory, and {strategy} gathers them;"
                " choose single or ddp, or compile: true"
            )
        if wanted and strategy == "zero3":
            raise UserError(
                "compile: zero3 gathers weights in hooks, which torch.compile cannot trace; choose zero2 or ddp"
            )
        for module in wanted:
            compile_forward(module, cuda_graphs)
