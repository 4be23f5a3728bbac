"""A recipe's parts, put together: the one place that builds all of a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import components, randomness
from dist_train.callbacks import Callback, Callbacks
from dist_train.callbacks.evaluate import Evaluate
from dist_train.callbacks.journal import Journal
from dist_train.callbacks.stragglers import Stragglers
from dist_train.data import RunData, data_folders, evaluation_batches, evaluation_sets
from dist_train.data_shards.tokens import load as load_tokenizer
from dist_train.duration import Duration
from dist_train.engine import Engine, make_engine
from dist_train.errors import UserError
from dist_train.metrics import Metric
from dist_train.networks import Player, hollow
from dist_train.networks.deferred import construct
from dist_train.networks.initialisation import initialise
from dist_train.networks.members import stacked, stacked_names
from dist_train.networks.players import make_players
from dist_train.networks.precision import set_numerics
from dist_train.objectives import Objective
from dist_train.parameter_groups import assign, heed_groups, parameter_groups
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.strategies import WEIGHTLESS
from dist_train.trainer import Trainer
from dist_train.world import World

if TYPE_CHECKING:
    from torch import nn


def build_one(recipe: Recipe, model: Any = None) -> Trainer:
    """Build a run of one process that leaves nothing behind, for a step on fake tensors (`tracing.foresee`). Modules
    that are given stay as they are: the step has fake copies of them."""
    if isinstance(model, Mapping):
        model = {name: hollow(module) for name, module in model.items()}
    elif model is not None:
        model = hollow(model)
    world = World(device_count=recipe.devices)
    return build(recipe, world, RunDirectory(Path("nowhere")), model=model)


def build(
    recipe: Recipe,
    world: World,
    directory: RunDirectory,
    overfit: int | None = None,
    micro_order: str = "forward",
    model: Any = None,
) -> Trainer:
    """Build every part of a run, at step 0."""
    set_numerics(tf32=recipe.tf32, deterministic=recipe.deterministic)
    if world.is_main:
        data_folders(recipe)
    world.barrier()
    data = RunData(recipe, world)
    evaluation, sets = None, {}
    if recipe.evaluate is not None:
        evaluation = evaluation_batches(recipe, world, recipe.evaluate.split)
        sets = evaluation_sets(recipe, world)
    objective = _objective(recipe, data)
    networks = make_networks(recipe, data.known, model, world.device)
    players = make_players(networks, recipe, world, objective.given)
    engines = {
        player: _engine(recipe, player, modules, players[player], objective, world)
        for player, modules in networks.items()
    }
    for engine in engines.values():
        engine.checks_order = any(e.views.by_layer for e in engines.values())
    steps = Duration.parse(recipe.duration).steps(
        samples=data.samples,
        global_batch=recipe.data.global_batch,
        tokens=data.tokens,
        turns=lambda player, step: sum(turn.player == player for turn in objective.turns(step)),
    )
    trainer = Trainer(
        recipe,
        world,
        engines,
        objective,
        make_callbacks(recipe),
        Repeated(data.batches, overfit) if overfit else data.batches,
        evaluation,
        {name: _metric(name) for name in recipe.evaluate.metrics} if recipe.evaluate else {},
        directory,
        total_steps=steps,
        samples_per_epoch=data.samples,
        tokens_per_epoch=data.tokens,
        fingerprint=data.fingerprint,
        micro_order=micro_order,
        evaluation_sets=sets,
    )
    return trainer


def _objective(recipe: Recipe, data: RunData) -> Objective:
    """With what it asks for of the data: statistics, or the tokenizer beside them."""
    given: dict[str, Any] = {"statistics": data.statistics, "root": recipe.root}
    part = components.resolve("objective", recipe.objective["name"], "objective.name")
    if "tokenizer" in components.arguments(part):
        folders = data_folders(recipe)
        if not folders:
            raise UserError(
                f"objective: {recipe.objective['name']} reads the tokenizer beside its data, and these are remote;"
                " give data.path a folder of this machine"
            )
        given["tokenizer"] = load_tokenizer(folders[0])
    return components.build("objective", recipe.objective, "objective", **given)


def _engine(
    recipe: Recipe,
    player: str,
    modules: Mapping[str, nn.Module],
    networks: Player,
    objective: Objective,
    world: World,
) -> Engine:
    """The engine of one player, whose networks are these modules as the recipe wants them to run."""
    spec, settings = recipe.optimizers[player], recipe.group_settings[player]
    where = recipe.where_of("optimizer", player)
    groups = partial(
        parameter_groups,
        weight_decay=spec.get("weight_decay", 0.0),
        settings=settings,
        rule_of=assign(modules, settings, where),
        stacked=stacked_names(modules),
    )

    def optimizer(groups: Any) -> Any:
        return heed_groups(components.build("optimizer", spec, where, groups=groups))

    return make_engine(
        recipe.strategies[player],
        networks,
        groups,
        optimizer,
        world,
        given=player in objective.given,
        micro_batches=recipe.data.global_batch // recipe.data.micro_batch // world.size,
    )


def make_networks(
    recipe: Recipe, known: Mapping[str, Any], given: Any = None, device: str | None = None
) -> dict[str, dict[str, nn.Module]]:
    """The networks by player and name, initialised from the seed alone; `auto` arguments come from the data.

    With a `device` the weights of players under zero3 or fsdp2 are made by their engine, one by one, and never whole.
    """
    from torch import nn

    networks: dict[str, dict[str, nn.Module]] = {}
    number = 0
    for player, specs in recipe.networks.items():
        networks[player] = {}
        for name, spec in specs.items():
            where = "model" if name == player == "model" else f"model.{player}"
            module = given.get(name) if isinstance(given, Mapping) else given
            if module is not None and recipe.members is not None:
                raise UserError(
                    f"{where}: a module is given with members, expected its name in the recipe"
                )
            if module is None:
                arguments = {key: _auto(key, value, known, where) for key, value in spec.items()}
                build = partial(_network, recipe, player, number, arguments, where)
                if device is not None and recipe.strategies[player]["name"] in WEIGHTLESS:
                    module = construct(build, device, where)
                else:
                    module = build()
            if not isinstance(module, nn.Module):
                raise UserError(
                    f"{where}: {spec['name']} is no torch.nn.Module but {type(module).__name__}"
                )
            networks[player][name] = module.train()
            number += 1
    return networks


def _network(
    recipe: Recipe, player: str, number: int, arguments: dict[str, Any], where: str
) -> nn.Module:
    """One network, or the recipe's members as one: each as the run of its own seed would build it."""
    if recipe.members is None:
        return _of_seed(recipe.seed, recipe, player, number, arguments, where)
    made = [
        _of_seed(recipe.seed + member, recipe, player, number, arguments, where)
        for member in range(recipe.members.count)
    ]
    return stacked(made, recipe.members.heads, "members")


def _of_seed(
    seed: int, recipe: Recipe, player: str, number: int, arguments: dict[str, Any], where: str
) -> nn.Module:
    randomness.reseed(seed, -1, number)
    module = components.build("model", arguments, where)
    if player in recipe.inits:
        randomness.reseed(seed, -2, number)
        initialise(module, recipe.inits[player], recipe.where_of("init", player))
    return module


def _auto(key: str, value: Any, known: Mapping[str, Any], where: str) -> Any:
    if value != "auto":
        return value
    if key not in known:
        told = ", ".join(f"{name}={known[name]}" for name in sorted(known)) or "nothing"
        raise UserError(
            f"{where}.{key}: auto, but the data do not tell (they tell {told}); write the value"
        )
    return known[key]


def make_callbacks(recipe: Recipe) -> Callbacks:
    """The recipe's callbacks, and those that every run has: evaluation, the journal and the search for stragglers."""
    instances: dict[str, Callback] = {
        "journal": Journal(recipe.log.every),
        "stragglers": Stragglers(recipe.log.every),
    }
    if recipe.evaluate is not None:
        section = recipe.evaluate
        instances["evaluate"] = Evaluate(
            section.every, section.best, section.mode or "max", section.weights
        )
    for instance, spec in recipe.callback_specs.items():
        if instance in instances:
            raise UserError(f"callbacks.{instance}: this name is taken; give the instance another")
        callback = components.build("callback", spec, f"callbacks.{instance}")
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks.{instance}: {spec['name']} is no dist_train.callbacks.Callback"
            )
        instances[instance] = callback
    for callback in instances.values():
        callback.configure(recipe)
    return Callbacks(instances)


def _metric(name: str) -> Metric:
    return Metric.wrap(components.resolve("metric", name, "evaluate.metrics"), name)


class Repeated:
    """The first `count` batches again and again, to see whether a model can learn them by heart."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches, self.count = batches, count

    def batch(self, step: int) -> Any:
        return self.batches.batch(step % self.count)

    def from_(self, step: int, stop: int) -> Any:
        kept = list(self.batches.from_(0, self.count))
        for now in range(step, stop):
            yield now, kept[now % self.count][1]
