"""The data section of a recipe: which samples, in which order, and how they become batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from dist_train.data_shards.remote import check_address, is_remote
from dist_train.errors import UserError, nearest
from dist_train.recipe.sections import NAME, Section, Spec
from dist_train.settings import short


class Transforms(Section):
    """What is done to a sample before it is stacked into a batch."""

    train: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )
    evaluate: list[Spec] = Field(
        default=[], description="a list of transforms, [{name: ..., arguments}]"
    )
    on: Literal["cpu", "device"] = Field(
        default="cpu", description="cpu (sample by sample) or device (images, a batch at a time)"
    )


class Origin(Section):
    """Where samples come from: a source by name, or a folder of shards."""

    name: str | None = Field(None, min_length=1, description="the name of a data source")
    path: str | None = Field(
        None,
        min_length=1,
        description="a folder of tar shards, or an https://, s3:// or gs:// address",
    )
    index: str | None = Field(
        None,
        min_length=1,
        description="a folder or address: where the index of a remote path stands",
    )
    options: dict[str, Any] = Field(default={}, description="a mapping of the source's arguments")
    on_damage: Literal["stop", "skip"] = Field(
        "stop",
        description="stop, or skip: leave what is damaged out of the index of a folder, and count it",
    )

    @property
    def is_remote(self) -> bool:
        """Whether its shards are behind an address."""
        return self.path is not None and is_remote(self.path)

    def check_origin(self) -> None:
        """Whether exactly one of `name` and `path` is there, and is possible."""
        if (self.name is None) == (self.path is None):
            more = " (`name: null` takes an inherited one away)" if self.name and self.path else ""
            raise UserError(
                f"name: got {short(self.name)} with path {short(self.path)}, expected one of the two{more}"
            )
        for key, address in (("path", self.path), ("index", self.index)):
            if address is not None and is_remote(address):
                try:
                    check_address(address)
                except UserError as error:
                    raise UserError(f"{key}: {error}") from None
        if self.index is not None and not self.is_remote:
            raise UserError(
                f"index: got {short(self.index)}, expected none: the index of a folder stands in it"
            )
        if self.on_damage == "skip" and self.is_remote:
            raise UserError(
                "on_damage: got skip, expected stop for an address: what is damaged is left out where the index is made"
            )
        if self.path is not None and self.options:
            raise UserError(
                f"options: got {short(self.options)}, expected none: they are for sources by name"
            )


class Source(Origin):
    """One source of a mixture."""

    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a positive number: its share, over their sum"
    )

    @model_validator(mode="after")
    def _check(self) -> Source:
        self.check_origin()
        return self


class Resample(Section):
    """Which samples an epoch holds instead of each once."""

    name: Literal["bootstrap"] = Field(description="bootstrap")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="a whole number, by default the recipe's seed"
    )


def _resample(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Stream(Origin):
    """One endless stream of samples: from where, in which order, and what is done to each."""

    sources: list[Source] | None = Field(
        None, min_length=1, description="a list of sources, [{path: ..., weight: 0.7}, ...]"
    )
    split: str = Field("train", pattern=NAME, description="the name of a split")
    shuffle: Literal["auto", "global", "window", "none"] = Field(
        "auto",
        description="global (all samples), window (some shards at a time), none, or auto: window where data are remote",
    )
    window: int = Field(
        16, ge=1, le=2**31, description="a whole number of shards open at once, 1 or more"
    )
    streams: int | Literal["auto"] = Field(
        "auto",
        description="a whole number of parts that feed fixed rows of each batch, or auto: 1 where data are local",
    )
    resample: Annotated[Resample | None, BeforeValidator(_resample)] = Field(
        None, description="bootstrap, or {name: bootstrap, seed: ...}"
    )
    transforms: Transforms = Field(
        default=Transforms(), description="{train: [...], evaluate: [...], on: cpu}"
    )
    scale: Literal["standard", "signed", "unit"] = Field(
        "standard", description="standard (mean 0, deviation 1), signed (-1 to 1) or unit (0 to 1)"
    )

    @property
    def origins(self) -> list[Source]:
        """All its sources."""
        if self.sources is not None:
            return self.sources
        return [
            Source(
                name=self.name,
                path=self.path,
                index=self.index,
                options=self.options,
                on_damage=self.on_damage,
                weight=1.0,
            )
        ]

    def check_stream(self, global_batch: int) -> None:
        """Whether its settings agree with each other and with the batch."""
        if self.sources is None:
            self.check_origin()
        elif self.name or self.path or self.options or self.on_damage != "stop":
            raise UserError(
                "sources: given together with name, path, options or on_damage, expected those in each of them"
            )
        if self.streams == "auto":
            pass
        elif self.streams < 1 or global_batch % self.streams:
            raise UserError(
                f"streams: got {self.streams}, expected auto or a divisor of global_batch "
                f"{global_batch}: {divisors(global_batch, self.streams)}"
            )
        if self.sources is not None and self.streams not in (1, "auto"):
            raise UserError(f"streams: got {self.streams}, expected 1 with several sources")
        everywhere = self.shuffle in ("global", "auto") and self.streams in (1, "auto")
        if self.resample is not None and not everywhere:
            raise UserError(
                f"resample: got {self.resample.name}, expected none with shuffle {self.shuffle} and streams "
                f"{self.streams}: its draws come from everywhere"
            )


class Cache(Section):
    """Where shards from elsewhere are kept, and how much of them."""

    dir: str = Field(
        default="~/.cache/dist-train/shards", min_length=1, description="a folder of this machine"
    )
    size: str = Field(
        default="64 GiB", pattern=r"^[1-9][0-9]* ?[KMGT]iB$", description="a size like '64 GiB'"
    )


class Data(Stream):
    """Which shards, and how they become batches.

    `data: {global_batch: ..., micro_batch: ..., a: {path: ...}, b: {path: ...}}` has two streams with names and orders
    of their own.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Stream]

    global_batch: int = Field(
        ge=1, le=2**31, description="a whole number of samples a step, over all ranks, 1 or more"
    )
    micro_batch: int = Field(
        ge=1, le=2**31, description="a whole number of samples a forward, 1 or more"
    )
    workers: int = Field(
        0, ge=0, le=1024, description="a whole number of loader processes a rank, 0 or more"
    )
    prefetch: int = Field(
        2, ge=1, le=1024, description="a whole number of batches made ahead by each worker"
    )

    cache: Cache = Field(default=Cache(), description="{dir: ..., size: 64 GiB}")

    @property
    def named(self) -> dict[str, Stream]:
        """Its streams by name; the only one is called ''."""
        return dict(self.__pydantic_extra__) or {"": self}

    def located(self) -> Iterator[tuple[Stream, str]]:
        """Each stream, and where its settings stand in the recipe."""
        for name, stream in self.named.items():
            yield stream, f"data.{name}" if name else "data"

    @model_validator(mode="before")
    @classmethod
    def _only_streams_are_named_freely(cls, settings: Any) -> Any:
        for key, value in settings.items() if isinstance(settings, dict) else ():
            if key in cls.model_fields:
                continue
            if not isinstance(value, dict) or not {"name", "path", "sources"} & set(value):
                keys = list(cls.model_fields)
                raise UserError(
                    f"{key}: unknown key{nearest(key, keys)} (expected one of {', '.join(keys)}, "
                    "or a stream {path: ...})"
                )
            if not key.isidentifier():
                raise UserError(f"{key}: expected a name of letters, digits and '_'")
        return settings

    @model_validator(mode="after")
    def _check(self) -> Data:
        for name, stream in self.named.items():
            try:
                stream.check_stream(self.global_batch)
            except UserError as error:
                raise UserError(f"{name}.{error}" if name else str(error)) from None
        if self.__pydantic_extra__:
            for key in sorted(self.model_fields_set & set(Stream.model_fields)):
                if getattr(self, key) != Stream.model_fields[key].default:
                    raise UserError(
                        f"{key}: given beside the streams {', '.join(self.named)}, "
                        "expected in each of them"
                    )
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"micro_batch: got {self.micro_batch}, expected a divisor of global_batch {self.global_batch}: "
                + divisors(self.global_batch, self.micro_batch)
            )
        return self


def divisors(number: int, near: int, count: int = 12) -> str:
    """The divisors of `number`, of many only those closest to `near`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = sorted(
        {*small, *(number // d for d in small)}, key=lambda d: abs(math.log(d / max(1, near)))
    )
    return ", ".join(map(str, sorted(found[:count])))
