"""A recipe says WHAT to run: pure data, checked whole before anything is built.

A mistake ends in one line, `FILE: key.path: got VALUE, expected ...`. Structure is checked when a recipe is made,
without torch; the arguments of its parts by `Recipe.check_components`, before any rank starts.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from dist_train import components
from dist_train.duration import Duration, Every
from dist_train.errors import UserError, nearest
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
from dist_train.yaml_text import write_yaml

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
PROVIDED: dict[str, tuple[str, ...]] = {"optimizer": ("groups",)}
"""Arguments that the trainer gives to the parts of a kind, so that a recipe cannot."""

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_NAMED = "a name of at most 64 letters, digits, '.', '_' and '-'"


def _spec(value: Any) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"got {short(value)}, expected a mapping {{name: ..., arguments}}")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise UserError(f"got {short(value)}, expected a mapping with a 'name' and its arguments")
    return value


def _duration(value: Any) -> Any:
    Duration.parse(value)
    return value


def _every(value: Any) -> Any:
    Every.parse(value)
    return value


Spec = Annotated[dict[str, Any], BeforeValidator(_spec)]
DurationText = Annotated[str, BeforeValidator(_duration)]
EveryText = Annotated[str, BeforeValidator(_every)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Transforms(_Section):
    """What is done to a sample before it is stacked into a batch."""

    train: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )
    evaluate: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )


class Data(_Section):
    """Which shards, and how they become batches."""

    name: str | None = Field(None, min_length=1, description="the name of a data source")
    path: str | None = Field(None, min_length=1, description="a folder of tar shards")
    options: dict[str, Any] = Field(default={}, description="a mapping of the source's arguments")
    split: str = Field("train", pattern=_NAME, description="the name of a split")
    global_batch: int = Field(
        ge=1, le=2**31, description="a whole number of samples a step, over all ranks, 1 or more"
    )
    micro_batch: int = Field(
        ge=1, le=2**31, description="a whole number of samples a forward, 1 or more"
    )
    transforms: Transforms = Field(
        default=Transforms(), description="{train: [...], evaluate: [...]}"
    )
    scale: Literal["standard", "signed", "unit"] = Field(
        "standard", description="standard (mean 0, deviation 1), signed (-1 to 1) or unit (0 to 1)"
    )
    workers: int = Field(
        0, ge=0, le=1024, description="a whole number of loader processes a rank, 0 or more"
    )

    @model_validator(mode="after")
    def _check(self) -> Data:
        if (self.name is None) == (self.path is None):
            raise UserError(
                f"name: got {short(self.name)} with path {short(self.path)}, expected one of the two"
            )
        if self.path is not None and "://" in self.path:
            raise UserError(f"path: got {short(self.path)}, expected a folder on this machine")
        if self.path is not None and self.options:
            raise UserError(
                f"options: got {short(self.options)}, expected none: they are for sources by name"
            )
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"micro_batch: got {self.micro_batch}, expected a divisor of global_batch {self.global_batch}: "
                + _divisors(self.global_batch, self.micro_batch)
            )
        return self


class Evaluate(_Section):
    """When to evaluate, on what, and which figure is the best."""

    split: str = Field(pattern=_NAME, description="the name of a split")
    every: EveryText = Field(description="a rhythm like '1 epoch' or '500 steps'")
    metrics: list[str] = Field(
        min_length=1, max_length=100, description="a list of metrics: names, or package.module:Name"
    )
    best: str | None = Field(None, description="one of the metrics")
    mode: Literal["min", "max"] | None = Field(None, description="min or max")
    weights: str = Field("live", description="live, or the callback that holds averaged weights")
    micro_batch: int | None = Field(None, ge=1, le=2**31, description="a whole number, 1 or more")

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"metrics: got {short(self.metrics)}, expected each once")
        if self.best is not None and self.best not in self.metrics:
            raise UserError(
                f"best: got {short(self.best)}, expected one of {', '.join(self.metrics)}"
                + nearest(self.best, self.metrics)
            )
        if (self.best is None) != (self.mode is None):
            raise UserError(
                f"mode: got {short(self.mode)} with best {short(self.best)}, expected both or neither: "
                "is the best one the min or the max?"
            )
        return self


class Log(_Section):
    """When a row is written."""

    every: EveryText = Field(default="10 steps", description="a rhythm like '10 steps'")


class Recipe(_Section):
    """A whole run as data: `Recipe.load("resnet-mnist").set("optimizer.momentum", 0.8)`, or `Recipe(**settings)`."""

    project: str = Field("default", pattern=_NAME, description=_NAMED)
    name: str = Field("run", pattern=_NAME, description=_NAMED)
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0 to 2**63 - 1")
    duration: DurationText = Field(
        description="a length of training like '20 epochs' or '500 steps'"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="fp32 or bf16")
    strategy: str | dict[str, Any] = Field("ddp", description=f"one of {', '.join(STRATEGIES)}")
    data: Data = Field(description="a mapping with name or path, global_batch and micro_batch")
    model: dict[str, Any] = Field(description="a network {name: ...}, or {player: network}")
    objective: Spec = Field(description="a mapping {name: ..., arguments}")
    optimizer: dict[str, Any] = Field(
        description="{name: ..., arguments}, or {player: {name: ...}}"
    )
    evaluate: Evaluate | None = Field(None, description="a mapping with split, every and metrics")
    callbacks: dict[str, Any] = Field(default={}, description="a mapping {instance: {arguments}}")
    log: Log = Field(default=Log(), description="a mapping with every")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="auto, or a whole number of threads a rank, 1 or more"
    )

    _source: str = PrivateAttr("recipe")
    _root: Path | None = PrivateAttr(None)

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**plain(settings, ""))
        except ValidationError as error:
            raise UserError(_explain(error)) from None

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
        if str(self.root) not in sys.path:
            sys.path.insert(0, str(self.root))

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
        """{player: spec}; one spec serves all players."""
        shared = isinstance(self.optimizer.get("name"), str)
        return {
            player: self.optimizer if shared else self.optimizer[player] for player in self.players
        }

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
        for instance, spec in self.callback_specs.items():
            yield "callback", spec, f"callbacks.{instance}"
        for mode in ("train", "evaluate"):
            for position, spec in enumerate(getattr(self.data.transforms, mode)):
                yield "transform", spec, f"data.transforms.{mode}.{position}"
        if self.data.name is not None:
            yield "source", {"name": self.data.name, **self.data.options}, "data"
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
                _check_types(part, spec, where, auto=kind == "model")
                if kind == "callback":
                    callback = components.build(kind, spec, where)
                    if not isinstance(callback, Callback):
                        raise UserError(
                            f"{where}: {spec['name']} is no dist_train.callbacks.Callback"
                        )
                    callback.configure(self)
                elif kind == "transform":
                    components.build(kind, spec, where)
                elif kind == "optimizer":
                    components.build(kind, spec, where, groups=_one_parameter())
            objective = components.build("objective", self.objective, "objective")
            if sorted(objective.players) != sorted(self.players):
                raise UserError(
                    f"model: got the players {', '.join(self.players)}, expected those of objective "
                    f"'{self.objective['name']}': {', '.join(objective.players)}"
                )
        except UserError as error:
            raise UserError(f"{self._source}: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        _check_networks(self.model)
        _check_players(self)
        for instance, spec in self.callbacks.items():
            where = f"callbacks.{instance}"
            if not re.fullmatch(_NAME, instance) or "." in instance:
                raise UserError(f"{where}: got {short(instance)}, expected {_NAMED}, without '.'")
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
                _check_weights(self, spec.get("weights", "live"), f"{where}.weights")
                _check_every(spec.get("every", "1 step"), f"{where}.every")
        if self.evaluate is not None:
            _check_weights(self, self.evaluate.weights, "evaluate.weights")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Checks across keys


def _check_networks(model: dict[str, Any]) -> None:
    if isinstance(model.get("name"), str):
        _spec(model)
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
                _spec(spec)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def _check_players(recipe: Recipe) -> None:
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
    for player, optimizer in recipe.optimizers.items():
        try:
            _spec(optimizer)
        except UserError as error:
            raise UserError(f"optimizer.{player}: {error}") from None
    for player, strategy in recipe.strategies.items():
        where = "strategy" if isinstance(recipe.strategy, str) else f"strategy.{player}"
        if isinstance(recipe.strategy, dict) and "name" in recipe.strategy:
            where = "strategy"
        _check_strategy(strategy, where)
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


def _check_strategy(strategy: Any, where: str) -> None:
    name = strategy.get("name") if isinstance(strategy, dict) else strategy
    if name == "auto":
        raise UserError(f"{where}: auto comes with plan; choose single, ddp, zero1, zero2 or zero3")
    if name not in STRATEGIES:
        raise UserError(
            f"{where}: got {short(name)}, expected one of {', '.join(STRATEGIES)}"
            + nearest(str(name), STRATEGIES)
        )
    known = ["name", "persistence_threshold"] if name == "zero3" else ["name"]
    for key in strategy:
        if key not in known:
            raise UserError(
                f"{where}.{key}: unknown key, {name} takes {', '.join(known)}{nearest(key, known)}"
            )
    threshold = strategy.get("persistence_threshold", 0)
    if not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 0:
        raise UserError(
            f"{where}.persistence_threshold: got {short(threshold)}, expected a whole number of elements, 0 or more"
        )


def _check_weights(recipe: Recipe, weights: object, where: str) -> None:
    choices = ["live", *recipe.callbacks]
    if weights not in choices:
        raise UserError(
            f"{where}: got {short(weights)}, expected 'live' or a callback of this recipe"
            + nearest(str(weights), choices)
        )


def _check_every(rhythm: object, where: str) -> None:
    try:
        Every.parse(rhythm)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_types(part: Any, spec: Mapping[str, Any], where: str, auto: bool) -> None:
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


def _one_parameter() -> list[dict[str, Any]]:
    """The smallest thing to optimise, for an optimiser that only has to accept its arguments."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    return [{"params": [weight], "names": ["weight"], "weight_decay": 0.0}]


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        return words.get(hint, hint.__name__)
    return re.sub(r"\b\w+\.", "", str(hint))


def _divisors(number: int, near: int, count: int = 12) -> str:
    """The divisors of `number`, of many only those closest to `near`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted(
        {*small, *(number // d for d in small)}, key=lambda d: abs(math.log(d / near))
    )
    return ", ".join(map(str, sorted(divisors[:count])))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes as one line


def _field_at(path: tuple[Any, ...]) -> tuple[type[BaseModel] | None, str]:
    """The section that `path` names, if it names one, and the description of the last field on the way."""
    section: type[BaseModel] | None = Recipe
    description = "a recipe"
    for key in path:
        field = section.model_fields.get(key) if section is not None else None
        section = None
        if field is not None:
            description = field.description or description
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return section, description


def _explain(error: ValidationError) -> str:
    mistakes = error.errors(include_url=False)
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    path = tuple(part for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    if first["type"] == "literal_error" and path[-1:] and path[-1] == "literal":
        path = path[:-1]
    section, description = _field_at(path)
    where = ".".join(map(str, path))
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        line = (
            f"{where}.{message}"
            if where and section
            else f"{where}: {message}"
            if where
            else message
        )
    elif first["type"] == "extra_forbidden":
        section, _ = _field_at(path[:-1])
        keys = list(section.model_fields) if section is not None else []
        line = f"{where}: unknown key{nearest(str(path[-1]), keys)} (expected one of {', '.join(keys)})"
    elif first["type"] == "missing":
        line = f"{where}: missing, expected {description}"
    else:
        line = f"{where}: got {short(first['input'])}, expected {description}"
    others = len({m["loc"][0] for m in mistakes if m["loc"]}) - 1
    return line if others < 1 else f"{line} (and {others} more)"
