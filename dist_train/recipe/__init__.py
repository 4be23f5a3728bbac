"""A recipe says WHAT to run: pure data, checked whole before anything is built.

A mistake ends in one line, `FILE: key.path: got VALUE, expected ...`. Structure is checked when a recipe is made,
without torch; the arguments of its parts by `Recipe.check_components`, before any rank starts.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from dist_train import components
from dist_train.errors import UserError
from dist_train.recipe.checks import (
    check_every,
    check_members,
    check_networks,
    check_optimizer,
    check_placement,
    check_players,
    check_types,
    check_weights,
)
from dist_train.recipe.data import Data
from dist_train.recipe.mistakes import explain
from dist_train.recipe.sections import (
    NAME,
    NAMED,
    DurationText,
    Evaluate,
    GroupSettings,
    Log,
    MembersSpec,
    Section,
    Spec,
    Watch,
    Weights,
)
from dist_train.settings import (
    RECIPES,
    assignment,
    locate,
    name_from,
    plain,
    put,
    read_settings,
    root_of,
    short,
)
from dist_train.strategies import AUTO, STRATEGIES
from dist_train.yaml_text import write_yaml

PROVIDED: dict[str, tuple[str, ...]] = {
    "optimizer": ("groups",),
    "init": ("weight", "fan_in", "fan_out"),
    "transform": ("statistics", "beside", "sample", "rng"),
    "objective": ("statistics", "root", "tokenizer"),
}
"""Arguments that the trainer gives to the parts of a kind, so that a recipe cannot."""


class Recipe(Section):
    """A whole run as data: `Recipe.load("resnet-mnist").set("optimizer.momentum", 0.8)`, or `Recipe(**settings)`."""

    project: str = Field("default", pattern=NAME, description=NAMED)
    name: str = Field("run", pattern=NAME, description=NAMED)
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0 to 2**63 - 1")
    duration: DurationText = Field(
        description="a length of training like '20 epochs' or '500 steps'"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="fp32, bf16 or fp16")
    tf32: bool = Field(False, description="true or false")
    deterministic: bool = Field(False, description="true or false")
    channels_last: bool = Field(False, description="true or false")
    activation_checkpointing: Literal["auto"] | list[str] | None = Field(
        None, description="auto, or a list of patterns of module names like 'blocks.*'"
    )
    compile: bool | Literal["cuda_graphs"] | list[str] = Field(
        False,
        description="true, false, cuda_graphs, or a list of patterns of module names like 'blocks.*'",
    )
    batch_norm: Literal["fixed", "synchronised"] = Field(
        "fixed", description="fixed (over a micro-batch) or synchronised (over the global batch)"
    )
    strategy: str | dict[str, Any] = Field(
        "ddp", description=f"one of {', '.join((AUTO, *STRATEGIES))}"
    )
    data: Data = Field(description="a mapping with name or path, global_batch and micro_batch")
    model: dict[str, Any] = Field(description="a network {name: ...}, or {player: network}")
    objective: Spec = Field(description="a mapping {name: ..., arguments}")
    members: MembersSpec | None = Field(
        None, description="a number of members, 2 or more, or a mapping {count: ..., heads: ...}"
    )
    optimizer: dict[str, Any] = Field(
        description="{name: ..., arguments}, or {player: {name: ...}}"
    )
    init: dict[str, Any] | None = Field(
        None, description="a mapping {name: ..., arguments}, or {player: {name: ...}}"
    )
    placement: dict[str, Annotated[int, Field(ge=1, le=64)]] = Field(
        default={}, description="a mapping {part of the network: device of the rank, 1 or more}"
    )
    weights: dict[str, Any] | None = Field(
        None, description="a mapping {from: ...}, or {player: {from: ...}}"
    )
    evaluate: Evaluate | None = Field(None, description="a mapping with split, every and metrics")
    callbacks: dict[str, Any] = Field(default={}, description="a mapping {instance: {arguments}}")
    log: Log = Field(default=Log(), description="a mapping with every")
    watch: Watch = Field(default=Watch(), description="a mapping with hang_after")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="auto, or a whole number of threads a rank, 1 or more"
    )
    launch: dict[str, Any] = Field(
        default={}, description="a mapping of what `launch` takes: on, nodes, gpus_per_node, ..."
    )

    _source: str = PrivateAttr("recipe")
    _root: Path | None = PrivateAttr(None)

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**plain(settings, ""))
        except ValidationError as error:
            raise UserError(explain(error, Recipe)) from None

    @classmethod
    def load(cls, recipe: str | Path, set: Sequence[str] = ()) -> Recipe:
        """Read a recipe: a name in `recipes/`, a YAML file, or a run directory; then apply `a.b=value` settings.

        Raises:
            UserError: one line that names the file, the key, the value and what would be valid.
        """
        file = locate(str(recipe))
        source = str(recipe) if file.parent != RECIPES else f"recipes/{file.name}"
        settings = read_settings(file, source, ())
        for text in set:
            key, value = assignment(text)
            try:
                put(settings, key, value)
            except UserError as error:
                raise UserError(f"{source}: {error}") from None
        settings.setdefault("name", name_from(file))
        return cls.restore(settings, source, root_of(file))

    @classmethod
    def restore(cls, settings: dict[str, Any], source: str, root: Path | None) -> Recipe:
        """A recipe from plain settings, with where it came from and its project root."""
        try:
            made = cls(**settings)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        made._source, made._root = source, root
        return made

    def set(self, key: str, value: Any) -> Recipe:
        """A copy with one setting changed, `recipe.set("data.micro_batch", 32)`; None removes it."""
        settings = self.as_dict()
        put(settings, key, value)
        return self.restore(settings, self._source, self._root)

    def as_dict(self) -> dict[str, Any]:
        """All settings, defaults included, as plain data that `Recipe(**...)` takes back."""
        return self.model_dump(exclude_none=True)

    def to_yaml(self) -> str:
        """All settings, defaults included, as a recipe that reads back equal."""
        return write_yaml(self.as_dict())

    @property
    def source(self) -> str:
        """Where this recipe came from, as errors name it."""
        return self._source

    @property
    def root(self) -> Path:
        """The project of this recipe: the nearest folder with a pyproject.toml, else the recipe's own."""
        return self._root or Path.cwd()

    def importable(self) -> None:
        """Make the user's own parts importable under every launcher: put `root` on the import path."""
        root = os.environ.get("DIST_TRAIN_CODE") or str(self.root)  # a launched run's own snapshot
        if root not in sys.path:
            sys.path.insert(0, root)

    @property
    def networks(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{player: {network: spec}}; a model with a name is the network `model` of the player `model`."""
        if isinstance(self.model.get("name"), str):
            return {"model": {"model": self.model}}
        return {
            player: {player: value} if isinstance(value.get("name"), str) else value
            for player, value in self.model.items()
        }

    @property
    def players(self) -> tuple[str, ...]:
        """Who has a turn: one optimiser and one engine each."""
        return tuple(self.networks)

    @property
    def optimizers(self) -> dict[str, dict[str, Any]]:
        """{player: spec}, without what `group_settings` has; one spec serves all players."""
        return {
            player: {k: v for k, v in spec.items() if k not in GroupSettings.model_fields}
            for player, spec in self.whole_optimizers.items()
        }

    @property
    def group_settings(self) -> dict[str, GroupSettings]:
        """{player: what its optimiser's `groups` and `l1` say}."""
        settings = {}
        for player, spec in self.whole_optimizers.items():
            where = self.where_of("optimizer", player)
            given = {k: v for k, v in spec.items() if k in GroupSettings.model_fields}
            try:
                settings[player] = GroupSettings(**given)
            except ValidationError as error:
                raise UserError(f"{where}.{explain(error, GroupSettings)}") from None
        return settings

    @property
    def whole_optimizers(self) -> dict[str, dict[str, Any]]:
        """{player: all that the recipe says of its optimiser}."""
        shared = isinstance(self.optimizer.get("name"), str)
        return {
            player: self.optimizer if shared else self.optimizer[player] for player in self.players
        }

    @property
    def inits(self) -> dict[str, dict[str, Any]]:
        """{player: {"name": ..., "bias": ..., arguments}}, for the players that do not start as their models do."""
        shared = self.init is None or isinstance(self.init.get("name"), str)
        given = dict.fromkeys(self.players, self.init) if shared else self.init
        return {player: spec for player, spec in (given or {}).items() if spec is not None}

    @property
    def starting_weights(self) -> dict[str, Weights]:
        """{player: where its weights come from}, for the players that do not start from the seed."""
        if self.weights is None:
            return {}
        shared = "from" in self.weights
        given = dict.fromkeys(self.players, self.weights) if shared else self.weights
        found = {}
        for player, spec in given.items():
            where = self.where_of("weights", player)
            if not isinstance(spec, dict):
                raise UserError(f"{where}: got {short(spec)}, expected a mapping {{from: ...}}")
            try:
                found[player] = Weights(**spec)
            except ValidationError as error:
                raise UserError(f"{where}.{explain(error, Weights)}") from None
        return found

    def where_of(self, key: str, player: str) -> str:
        """The path of what `key` says for a player: `weights`, or `weights.critic`."""
        value = getattr(self, key)
        shared = (
            not isinstance(value, dict) or "from" in value or isinstance(value.get("name"), str)
        )
        return key if shared else f"{key}.{player}"

    @property
    def strategies(self) -> dict[str, dict[str, Any]]:
        """{player: {"name": "zero2"}}; one strategy serves all players."""
        value = self.strategy
        if isinstance(value, str) or isinstance(value.get("name"), str):
            value = dict.fromkeys(self.players, value)
        return {
            player: {"name": one} if isinstance(one, str) else one for player, one in value.items()
        }

    @property
    def devices(self) -> int:
        """How many devices a rank takes."""
        return 1 + max(self.placement.values(), default=0)

    @property
    def callback_specs(self) -> dict[str, dict[str, Any]]:
        """{instance: {"name": ..., arguments}}; the name of a callback is its instance's unless it says otherwise."""
        return {instance: {"name": instance} | spec for instance, spec in self.callbacks.items()}

    def parts(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Every part this recipe names, as (kind, spec, key path)."""
        named = isinstance(self.model.get("name"), str)
        for player, networks in self.networks.items():
            for network, spec in networks.items():
                inner = "" if network == player else f".{network}"
                yield "model", spec, "model" if named else f"model.{player}{inner}"
        yield "objective", self.objective, "objective"
        shared = isinstance(self.optimizer.get("name"), str)
        for player in self.players[:1] if shared else self.players:
            yield (
                "optimizer",
                self.optimizers[player],
                "optimizer" if shared else f"optimizer.{player}",
            )
        for player, spec in self.inits.items():
            scheme = {key: value for key, value in spec.items() if key != "bias"}
            yield "init", scheme, self.where_of("init", player)
        for instance, spec in self.callback_specs.items():
            yield "callback", spec, f"callbacks.{instance}"
        for stream, where in self.data.located():
            for mode in ("train", "evaluate"):
                for position, spec in enumerate(getattr(stream.transforms, mode)):
                    yield "transform", spec, f"{where}.transforms.{mode}.{position}"
            for position, source in enumerate(stream.origins):
                inner = "" if stream.sources is None else f".sources.{position}"
                if source.name is not None:
                    yield "source", {"name": source.name, **source.options}, f"{where}{inner}"
        for position, metric in enumerate(self.evaluate.metrics if self.evaluate else []):
            yield "metric", {"name": metric}, f"evaluate.metrics.{position}"

    def check_components(self) -> None:
        """Check every part: that it exists, that it takes its arguments, and that it accepts their values.

        This imports the parts (and with them torch). `auto` stands for any argument of a network. Raises UserError.
        """
        from dist_train.callbacks import Callback

        self.importable()
        try:
            for kind, spec, where in self.parts():
                if kind == "metric":
                    components.resolve(kind, spec["name"], where)
                    continue
                part = components.check(kind, spec, where, PROVIDED.get(kind, ()))
                check_types(part, spec, where, auto=kind == "model")
                if kind == "callback":
                    callback = components.build(kind, spec, where)
                    if not isinstance(callback, Callback):
                        raise UserError(
                            f"{where}: {spec['name']} is no dist_train.callbacks.Callback"
                        )
                    callback.configure(self)
                elif kind == "transform" and "statistics" not in components.arguments(part):
                    components.build(kind, spec, where)
                elif kind == "optimizer":
                    check_optimizer(spec, where)
            objective = components.build("objective", self.objective, "objective", root=self.root)
            if sorted(objective.players) != sorted(self.players):
                raise UserError(
                    f"model: got the players {', '.join(self.players)}, expected those of objective "
                    f"'{self.objective['name']}': {', '.join(objective.players)}"
                )
            for stream, where in self.data.located():
                if objective.scale not in (None, stream.scale):
                    raise UserError(
                        f"{where}.scale: got {stream.scale}, expected {objective.scale}, which objective "
                        f"'{self.objective['name']}' needs with these settings"
                    )
        except UserError as error:
            raise UserError(f"{self._source}: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        check_networks(self.model)
        check_players(self)
        check_placement(self)
        check_members(self)
        for instance, spec in self.callbacks.items():
            where = f"callbacks.{instance}"
            if not re.fullmatch(NAME, instance) or "." in instance:
                raise UserError(f"{where}: got {short(instance)}, expected {NAMED}, without '.'")
            if not isinstance(spec, dict):
                raise UserError(
                    f"{where}: got {short(spec)}, expected a mapping of arguments, {{}} for none"
                )
        for kind, spec, where in self.parts():
            name, ours = spec["name"], components.CATALOGUE[kind]
            if not isinstance(name, str) or (":" not in name and name not in ours):
                components.resolve(kind, name, f"{where}.name" if kind != "metric" else where)
            if (
                kind == "callback" and name in ours
            ):  # whose `weights` and `every` are known to mean this
                check_weights(self, spec.get("weights", "live"), f"{where}.weights")
                check_every(spec.get("every", "1 step"), f"{where}.every")
        if self.evaluate is not None:
            check_weights(self, self.evaluate.weights, "evaluate.weights")
        return self
