"""The sections of a recipe: their keys, what each may be, and what must agree within one section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dist_train.components import import_path
from dist_train.duration import Duration, Every
from dist_train.errors import UserError, nearest
from dist_train.settings import short

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAMED = "a name of at most 64 letters, digits, '.', '_' and '-'"


def as_spec(value: Any) -> Any:
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


Spec = Annotated[dict[str, Any], BeforeValidator(as_spec)]
DurationText = Annotated[str, BeforeValidator(_duration)]
EveryText = Annotated[str, BeforeValidator(_every)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EvaluationSet(Section):
    """Another set that is evaluated beside the first: a split of the training data, or of other data."""

    split: str = Field(pattern=NAME, description="the name of a split")
    name: str | None = Field(None, min_length=1, description="the name of a data source")
    path: str | None = Field(None, min_length=1, description="a folder of tar shards")
    options: dict[str, Any] = Field(default={}, description="a mapping of the source's arguments")

    @model_validator(mode="after")
    def _check(self) -> EvaluationSet:
        if self.name is not None and self.path is not None:
            raise UserError(f"name: got {short(self.name)} with a path, expected one of the two")
        if self.options and self.name is None:
            raise UserError(f"options: got {short(self.options)}, expected none without a name")
        return self


class Evaluate(Section):
    """When to evaluate, on what, and which figure is the best."""

    split: str = Field(pattern=NAME, description="the name of a split")
    every: EveryText = Field(description="a rhythm like '1 epoch' or '500 steps'")
    metrics: list[str] = Field(
        min_length=1, max_length=100, description="a list of metrics: names, or package.module:Name"
    )
    sets: dict[str, EvaluationSet] = Field(
        default={}, description="a mapping {name: {split: ...}} of further sets"
    )
    best: str | None = Field(None, description="one of the metrics, or SET/METRIC")
    mode: Literal["min", "max"] | None = Field(None, description="min or max")
    weights: str = Field("live", description="live, or the callback that holds averaged weights")
    micro_batch: int | None = Field(None, ge=1, le=2**31, description="a whole number, 1 or more")

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"metrics: got {short(self.metrics)}, expected each once")
        for position, metric in enumerate(self.metrics):
            import_path("metric", metric, f"metrics.{position}")
        for name in self.sets:
            if not re.fullmatch(NAME, name) or name in self.metrics:
                raise UserError(f"sets.{name}: expected {NAMED}, and no metric's")
        figures = [*self.metrics, *(f"{name}/{m}" for name in self.sets for m in self.metrics)]
        if self.best is not None and self.best not in figures:
            raise UserError(
                f"best: got {short(self.best)}, expected one of {', '.join(figures)}"
                + nearest(self.best, figures)
            )
        if (self.best is None) != (self.mode is None):
            raise UserError(
                f"mode: got {short(self.mode)} with best {short(self.best)}, expected both or neither: "
                "is the best one the min or the max?"
            )
        return self


class Group(Section):
    """Settings of the parameters whose names match."""

    match: str = Field(min_length=1, description="a pattern of parameter names, like 'stem.*'")
    frozen: bool = Field(False, description="true or false")
    learning_rate_scale: float = Field(1.0, ge=0, description="a number, 0 or more")
    weight_decay: float | None = Field(None, ge=0, description="a number, 0 or more")
    l1: float | None = Field(None, ge=0, description="a number, 0 or more")

    @model_validator(mode="after")
    def _check(self) -> Group:
        if self.frozen and self.model_fields_set - {"match", "frozen"}:
            others = sorted(self.model_fields_set - {"match", "frozen"})
            raise UserError(f"frozen: got true with {', '.join(others)}, which then have no effect")
        return self


class GroupSettings(Section):
    """What every optimiser takes beside its own arguments."""

    groups: list[Group] = Field(default=[], description="a list [{match: ..., settings}]")
    l1: float = Field(0.0, ge=0, description="a number, 0 or more")


class Members(Section):
    """Several networks that are trained as one."""

    count: int = Field(ge=2, le=1000, description="a whole number of members, 2 or more")
    heads: str | None = Field(
        None, min_length=1, description="the layer that each member has of its own, like 'output'"
    )


def _members(value: Any) -> Any:
    return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value


MembersSpec = Annotated[Members, BeforeValidator(_members)]


class Watch(Section):
    """When a run that stands still is ended."""

    hang_after: float = Field(
        default=300.0,
        gt=0,
        description="a number of seconds: a phase of a step that takes longer hangs",
    )


class Rename(Section):
    """Another name for tensors of a source of weights."""

    old: str = Field(alias="from", min_length=1, description="a name, with at most one '*'")
    new: str = Field(alias="to", min_length=1, description="a name, with '*' where 'from' has one")

    @model_validator(mode="after")
    def _check(self) -> Rename:
        if self.old.count("*") > 1 or self.old.count("*") != self.new.count("*"):
            raise UserError(
                f"to: got {short(self.new)} with from {short(self.old)}, expected at most one '*' in"
                " each, and in both or in neither"
            )
        return self


class Weights(Section):
    """Where a player's weights come from before step 0."""

    source: str = Field(
        alias="from",
        min_length=1,
        description="a run directory, a .safetensors file, a folder, or hf://ORG/MODEL",
    )
    averages: str | None = Field(None, description="the callback of that run that averages weights")
    rename: list[Rename] = Field(default=[], description="a list [{from: ..., to: ...}]")
    missing: Literal["error", "ignore"] = Field("error", description="error or ignore")
    extra: Literal["error", "ignore"] = Field("error", description="error or ignore")
    mismatched: Literal["error", "ignore"] = Field("error", description="error or ignore")


class Log(Section):
    """When a row is written."""

    every: EveryText = Field(default="10 steps", description="a rhythm like '10 steps'")
