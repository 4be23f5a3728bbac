"""Several sets of shards as one: their samples side by side, and an order that takes from each by its weight."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dist_train.data_shards.index import Field, Index, Shard
from dist_train.data_shards.order import Ordering
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.storage import Bucket
from dist_train.errors import UserError


class Mixture:
    """An order that takes from several orders in fixed proportions, each running through its own epochs.

    Which one place i takes from is a function of i alone: of the first n places floor(n * w) go to the first source,
    where w is its share; the rest is shared out among the others in the same way. So any run of places, and with it any
    batch, holds of each source what its weight says, to less than one sample a source before it. The ids of source k
    follow those of the sources before it. An epoch has as many places as the sources have samples.
    """

    def __init__(self, orders: Sequence[Ordering], weights: Sequence[float]) -> None:
        self.orders = list(orders)
        self.size = sum(order.size for order in orders)
        self._first_ids = list(itertools.accumulate([0, *(order.size for order in orders)]))[:-1]
        left = itertools.accumulate(reversed([Fraction(str(weight)) for weight in weights]))
        self._shares = [
            (Fraction(str(weight)) / rest).limit_denominator(10**6)
            for weight, rest in zip(weights, reversed(list(left)), strict=True)
        ]

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, ids), int64 arrays, of the places [start, stop)."""
        epochs = np.empty(stop - start, np.int64)
        ids = np.empty(stop - start, np.int64)
        places = np.arange(start, stop, dtype=np.int64)  # counted among what is left to share out
        rows = np.arange(stop - start)
        for order, share, first_id in zip(self.orders, self._shares, self._first_ids, strict=True):
            before = _floor(places, share)
            taken = _floor(places + 1, share) > before
            if taken.any():
                own = before[taken]
                epochs[rows[taken]], drawn = order.at(int(own[0]), int(own[-1]) + 1)
                ids[rows[taken]] = first_id + drawn
            places, rows = (places - before)[~taken], rows[~taken]
        return epochs, ids


def _floor(counts: np.ndarray, share: Fraction) -> np.ndarray:
    """floor(counts * share), without overflow."""
    whole, rest = np.divmod(counts, share.denominator)
    return whole * share.numerator + rest * share.numerator // share.denominator


class Together:
    """Several sets of shards read as one; sample ids go through them one after the other.

    They must have the same fields (by name and kind), classes and vocabulary. The statistics of pictures are those of
    samples drawn by `weights`, by default the numbers of samples.
    """

    def __init__(self, parts: Sequence[Shards], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self._stops = np.cumsum([len(part) for part in parts])
        self.index = _one_index(self.parts, weights or [len(part) for part in parts])
        self.folder = self.index.name

    def __len__(self) -> int:
        return int(self._stops[-1])

    @property
    def tokens(self) -> int | None:
        """How many targets all have together, where their samples are tokens."""
        counts = [part.tokens for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)

    def sample(self, i: int, fields: tuple[str, ...]) -> dict[str, Any]:
        """Those fields of sample `i`, decoded."""
        part, own = self._find(i)
        return part.sample(own, fields)

    def columns(self, names: Sequence[str], ids: np.ndarray) -> dict[str, Any]:
        """Fields of many samples: each an array (len(ids), ...) where it has the same shape in all, else a list."""
        numbers = np.searchsorted(self._stops, ids, "right")
        values: dict[str, list[Any]] = {name: [None] * len(ids) for name in names}
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            part = self.parts[number]
            columns = part.columns(names, ids[rows] - (self._stops[number] - len(part)))
            if len(rows) == len(ids):
                return columns
            for name, column in columns.items():
                for row, value in zip(rows.tolist(), column, strict=True):
                    values[name][row] = value
        return {name: _stacked(column) for name, column in values.items()}

    def needs(self, ids: np.ndarray) -> list[tuple[Bucket, Shard]]:
        """The shards that reading `ids` fetches from elsewhere."""
        numbers = np.searchsorted(self._stops, ids, "right")
        return [
            need
            for number, part in enumerate(self.parts)
            for need in part.needs(ids[numbers == number] - self._stops[number] + len(part))
        ]

    def where(self, i: int) -> str:
        """Shard and key of sample `i`, for messages."""
        part, own = self._find(i)
        return part.where(own)

    def _find(self, i: int) -> tuple[Shards, int]:
        number = int(np.searchsorted(self._stops, i, "right"))
        return self.parts[number], i - int(self._stops[number]) + len(self.parts[number])


def _stacked(values: list[Any]) -> Any:
    shapes = {getattr(value, "shape", None) for value in values}
    return np.stack(values) if len(shapes) == 1 and None not in shapes else values


def _one_index(parts: list[Shards], weights: Sequence[float]) -> Index:
    """What the parts have in common, as an index without shards."""
    first = parts[0].index
    fields = {spec.name: spec for spec in first.fields.values()}
    for part in parts[1:]:
        index = part.index
        own = {spec.name: spec for spec in index.fields.values()}
        for what, ours, theirs in (
            ("fields", {n: f.kind for n, f in fields.items()}, {n: f.kind for n, f in own.items()}),
            ("classes", first.classes, index.classes),
            ("vocabulary", first.vocabulary, index.vocabulary),
        ):
            if ours != theirs:
                raise UserError(
                    f"data.sources: {part.storage.name} has the {what} {theirs}, {parts[0].storage.name} {ours}: "
                    "sources of one mixture must have the same"
                )
        fields = {name: _one_field(fields[name], own[name]) for name in fields}
    total = sum(weights)
    shares = np.array([weight / total for weight in weights])
    statistics = {}
    for name in first.statistics:
        known = [part.index.statistics.get(name, {"mean": [], "std": []}) for part in parts]
        if len({len(one["mean"]) for one in known}) == 1:
            means, deviations = (np.array([one[key] for one in known]) for key in ("mean", "std"))
            mean = shares @ means
            square = shares @ (deviations**2 + means**2)
            std = np.sqrt(np.maximum(square - mean**2, 0))
            statistics[name] = {"mean": mean.tolist(), "std": std.tolist()}
    prints = hashlib.sha256(" ".join(part.index.fingerprint for part in parts).encode())
    return dataclasses.replace(
        first,
        name=" + ".join(part.index.name for part in parts),
        fields=fields,
        splits={},
        statistics=statistics,
        tokens={},
        source=prints.hexdigest(),  # so that this index has a fingerprint of all its parts
        licence="; ".join(dict.fromkeys(part.index.licence for part in parts)),
    )


def _one_field(ours: Field, theirs: Field) -> Field:
    """A field of both: what differs in its shape is None, a field of other axes has no shape."""
    shape: list[int | None] | None = None
    if ours.shape and theirs.shape and len(ours.shape) == len(theirs.shape):
        pairs = zip(ours.shape, theirs.shape, strict=True)
        if ours.kind == "tokens":
            shape = [max(one or 0, other or 0) for one, other in pairs]
        else:
            shape = [one if one == other else None for one, other in pairs]
    return dataclasses.replace(ours, shape=shape)
