"""The sections of a recipe: their keys, what each may be, and what must agree within one section."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


class Transforms(Section):
    """What is done to a sample before it is stacked into a batch."""

    train: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )
    evaluate: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )


class Data(Section):
    """Which shards, and how they become batches."""

    name: str | None = Field(None, min_length=1, description="the name of a data source")
    path: str | None = Field(None, min_length=1, description="a folder of tar shards")
    options: dict[str, Any] = Field(default={}, description="a mapping of the source's arguments")
    split: str = Field("train", pattern=NAME, description="the name of a split")
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


class Evaluate(Section):
    """When to evaluate, on what, and which figure is the best."""

    split: str = Field(pattern=NAME, description="the name of a split")
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


class Watch(Section):
    """When a run that stands still is ended."""

    hang_after: float = Field(
        default=300.0,
        gt=0,
        description="a number of seconds: a phase of a step that takes longer hangs",
    )


class Log(Section):
    """When a row is written."""

    every: EveryText = Field(default="10 steps", description="a rhythm like '10 steps'")


def _divisors(number: int, near: int, count: int = 12) -> str:
    """The divisors of `number`, of many only those closest to `near`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted(
        {*small, *(number // d for d in small)}, key=lambda d: abs(math.log(d / near))
    )
    return ", ".join(map(str, sorted(divisors[:count])))
