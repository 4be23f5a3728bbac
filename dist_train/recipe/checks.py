"""Checks of a recipe across its keys: players, strategies, rhythms, weights, and the arguments of its parts."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from dist_train import components
from dist_train.duration import Duration, Every
from dist_train.errors import UserError, nearest
from dist_train.recipe.sections import as_spec
from dist_train.settings import short
from dist_train.strategies import SHARDED, check_ranks, check_strategy

if TYPE_CHECKING:
    from dist_train.recipe import Recipe

SHARDED_WEIGHTS = ("zero3", "fsdp2")
"""Strategies under which a layer's weights are gathered when it is called."""
WHOLE_TENSORS = ("adafactor", "muon")
"""Optimisers whose update of an element depends on the rest of its tensor."""
SPREAD = ("strategy", "placement", "threads", "workers", "prefetch", "watch", "launch")
"""Settings that change how a run is spread, never what it computes: a resume may change them."""


def check_networks(model: dict[str, Any]) -> None:
    if isinstance(model.get("name"), str):
        as_spec(model)
        return
    if not model:
        raise UserError("model: got {}, expected a network {name: ...}, or {player: network}")
    seen: set[str] = set()
    for player, value in model.items():
        if not isinstance(value, dict) or not value:
            raise UserError(f"model.{player}: got {short(value)}, expected a network {{name: ...}}")
        nested = isinstance(value.get("name", {}), dict)
        for network, spec in (value if nested else {player: value}).items():
            where = f"model.{player}.{network}" if nested else f"model.{player}"
            if not player.isidentifier() or not network.isidentifier():
                raise UserError(f"{where}: expected a name of letters, digits and '_'")
            if network in seen:
                raise UserError(
                    f"{where}: the network '{network}' is there twice, expected names that differ"
                )
            seen.add(network)
            try:
                as_spec(spec)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def check_placement(recipe: Recipe) -> None:
    """A network over several devices of a rank is one network, whole on every rank."""
    if not recipe.placement:
        return
    if list(recipe.networks.items()) != [("model", {"model": recipe.model})]:
        raise UserError(
            f"placement: got {short(recipe.placement)}, expected none with several players or networks"
        )
    numbers = set(recipe.placement.values())
    if numbers != set(range(1, recipe.devices)):
        raise UserError(
            f"placement: got the devices {', '.join(map(str, sorted(numbers)))}, expected all of 1 to"
            f" {recipe.devices - 1} (what is not named is on device 0)"
        )
    name = recipe.strategies["model"]["name"]
    if name not in ("single", "ddp"):
        raise UserError(
            f"strategy: got {name} with a placement, expected single or ddp: others keep all of a rank on one device"
        )
    if recipe.compile:
        raise UserError(
            "compile: got true with a placement, expected false: its hooks cannot be traced"
        )


def check_members(recipe: Recipe) -> None:
    """Members in one network: whatever acts on each weight by itself acts on each member's; the rest is refused."""
    if recipe.members is None:
        return
    if list(recipe.networks.items()) != [("model", {"model": recipe.model})]:
        raise UserError("members: expected none with several players or networks")
    if list(recipe.data.named) != [""]:
        raise UserError("members: expected none with several named streams of data")
    name = recipe.strategies["model"]["name"]
    if name in SHARDED_WEIGHTS:
        raise UserError(
            f"strategy: got {name} with members, expected single, ddp, zero1 or zero2: it gathers weights in hooks,"
            " which vmap cannot see"
        )
    if recipe.optimizers["model"]["name"] in WHOLE_TENSORS:
        raise UserError(
            f"optimizer: got {recipe.optimizers['model']['name']} with members, expected one that updates each weight"
            " by itself"
        )
    settings = {
        "compile": bool(recipe.compile),
        "activation_checkpointing": recipe.activation_checkpointing is not None,
        "placement": bool(recipe.placement),
        "weights": recipe.weights is not None,
        "batch_norm": recipe.batch_norm == "synchronised",
    }
    for key, given in settings.items():
        if given:
            raise UserError(f"{key}: got {short(getattr(recipe, key))}, expected none with members")
    for instance, spec in recipe.callback_specs.items():
        if spec["name"] == "clip_gradients" and "norm" in spec and recipe.members.heads is None:
            raise UserError(
                f"callbacks.{instance}.norm: got {short(spec['norm'])} with members, expected value: the norm would be"
                " that of all members together"
            )


def check_players(recipe: Recipe) -> None:
    """Whatever is given by player is given for each of them, and for nobody else."""
    players = recipe.players
    for key in ("optimizer", "strategy"):
        value = getattr(recipe, key)
        if isinstance(value, str) or isinstance(value.get("name"), str):
            continue
        for player in value:
            if player not in players:
                raise UserError(
                    f"{key}.{player}: expected a 'name', or one entry for each of the players "
                    f"{', '.join(players)}{nearest(player, [*players, 'name'])}"
                )
        for player in players:
            if player not in value:
                raise UserError(
                    f"{key}.{player}: missing, expected a 'name', or one entry a player"
                )
    for player, optimizer in recipe.whole_optimizers.items():
        try:
            as_spec(optimizer)
        except UserError as error:
            raise UserError(f"optimizer.{player}: {error}") from None
    for player, strategy in recipe.strategies.items():
        where = "strategy" if isinstance(recipe.strategy, str) else f"strategy.{player}"
        if isinstance(recipe.strategy, dict) and "name" in recipe.strategy:
            where = "strategy"
        check_strategy(strategy, where)
        optimizer = recipe.optimizers[player]["name"]
        if optimizer in WHOLE_TENSORS and strategy["name"] in SHARDED:
            raise UserError(
                f"{where}: got {strategy['name']}, which cuts tensors into pieces, but optimizer"
                f" '{optimizer}' needs each whole; choose single or ddp, or another optimizer"
            )
    for key, first, named in (
        ("weights", "from", list(recipe.starting_weights)),
        ("init", "name", list(recipe.inits)),
    ):
        for player in named:
            if player not in players:
                raise UserError(
                    f"{key}.{player}: expected '{first}', or some of the players {', '.join(players)}"
                    + nearest(player, [*players, first])
                )
    for player, init in recipe.inits.items():
        try:
            as_spec(init)
        except UserError as error:
            raise UserError(f"{recipe.where_of('init', player)}: {error}") from None
        if not isinstance(init.get("bias", 0), int | float):
            raise UserError(
                f"{recipe.where_of('init', player)}.bias: got {short(init['bias'])}, expected a number"
            )
    assert recipe.group_settings.keys() == set(players)  # raises what is wrong in them
    for instance, spec in recipe.callbacks.items():
        chosen = spec.get("players", []) if isinstance(spec, dict) else []
        where = f"callbacks.{instance}.players"
        if not isinstance(chosen, list):
            raise UserError(f"{where}: got {short(chosen)}, expected a list of players")
        for player in chosen:
            if player not in players:
                raise UserError(
                    f"{where}: got {short(player)}, expected one of {', '.join(players)}"
                    + nearest(player, players)
                )
    player = Duration.parse(recipe.duration).player
    if player is not None and player not in players:
        raise UserError(
            f"duration: got {short(recipe.duration)}, expected one of the players {', '.join(players)}"
            + nearest(player, players)
        )


def check_shard_degrees(recipe: Recipe, ranks: int) -> None:
    """Raise UserError where the ranks do not divide into the groups of a strategy."""
    for player, strategy in recipe.strategies.items():
        check_ranks(strategy, ranks, recipe.where_of("strategy", player))


def check_weights(recipe: Recipe, weights: object, where: str) -> None:
    choices = ["live", *recipe.callbacks]
    if weights not in choices:
        raise UserError(
            f"{where}: got {short(weights)}, expected 'live' or a callback of this recipe"
            + nearest(str(weights), choices)
        )


def check_every(rhythm: object, where: str) -> None:
    try:
        Every.parse(rhythm)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_types(part: Any, spec: Mapping[str, Any], where: str, auto: bool) -> None:
    """Check a spec's values against the annotations of its part, as far as they are plain types."""
    try:
        parameters = inspect.signature(part, eval_str=True).parameters
    except NameError:  # an annotation that only a type checker can see
        return
    hints = {
        name: parameter.annotation
        for name, parameter in parameters.items()
        if name != "name" and parameter.annotation is not inspect.Parameter.empty
    }
    for key, value in spec.items():
        if hints.get(key, inspect.Parameter.empty) is inspect.Parameter.empty or (
            auto and value == "auto"
        ):
            continue
        try:
            adapter = TypeAdapter(hints[key])
        except (PydanticSchemaGenerationError, PydanticUserError):
            continue
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError:
            raise UserError(
                f"{where}.{key}: got {short(value)}, expected {_type_name(hints[key])}"
            ) from None


def check_optimizer(spec: Mapping[str, Any], where: str) -> None:
    """Build an optimiser on one weight. Of one that is not ours the first steps must be the same whether its state is
    there before them, as checkpoints need it, or not."""
    import torch

    from dist_train.engine import materialise
    from dist_train.parameter_groups import ANY

    ends = []
    for prepare in (materialise, lambda optimizer: None):
        weight = torch.nn.Parameter(torch.ones(1))
        groups = [{"params": [weight], "names": [ANY], "weight_decay": 0.0}]
        optimizer = components.build("optimizer", spec, where, groups=groups)
        if spec["name"] in components.CATALOGUE["optimizer"]:
            return
        prepare(optimizer)
        for _ in range(2):
            weight.grad = torch.ones(1)
            optimizer.step()
        ends.append(float(weight.detach()))
    if ends[0] != ends[1]:
        raise UserError(
            f"{where}: the state of {spec['name']} does not begin at 0; expected an optimiser whose state is tensors"
            " that do, for a run begins from a state that can be saved"
        )


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        return words.get(hint, hint.__name__)
    return re.sub(r"\b\w+\.", "", str(hint))


def check_same_run(new: Recipe, old: Recipe, path: Path) -> None:
    """A run goes on under its own recipe; only how it is spread may change. `path` is the run's directory."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict) or (not value and "." in prefix):  # {} is a callback, too
            return {prefix: value}
        return {
            k: v
            for key, part in value.items()
            for k, v in flat(part, f"{prefix}.{key}".strip(".")).items()
        }

    before, after = flat(old.as_dict()), flat(new.as_dict())
    for key in sorted(set(before) | set(after)):
        spread = bool({key.split(".")[0], key.split(".")[-1]} & set(SPREAD))
        spread = spread or key.startswith("data.cache.")
        if before.get(key) != after.get(key) and not spread:
            raise UserError(
                f"{key} is {after.get(key)!r}, but {path} was begun with {before.get(key)!r};"
                " a run goes on under its own recipe (start a new one to change it)"
            )
