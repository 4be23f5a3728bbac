"""Batches: which samples go where is decided here (laws 1 to 3), and no rank or worker can change what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dist_train.data_shards.assembler import Assembler, Transform
from dist_train.data_shards.order import Order, Ordering
from dist_train.data_shards.prefetch import Need, Prefetch
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.workers import Ahead
from dist_train.errors import UserError, nearest

EVALUATION = -1
"""The epoch whose draws evaluation transforms use."""


@dataclass
class MicroBatch:
    """The unit of forward and backward. Every tensor has len(ids) rows, of which the first `real` count.

    Where the data have several streams, field `image` of stream `a` is `micro["a.image"]`, and `ids` is (b, streams).
    `tensors` may hold image (b, C, H, W) float32, label (b,) int64, tokens (b, T + 1) int64 padded right with 0, with
    length (b,) int64, the number of targets of each row (NAME_length where the tokens are called NAME); and arrays
    under their own names. `memory` is an objective's own: tensors that the micro-batch with this index finds again in
    the next step, also after a resume on other ranks.
    """

    index: int
    ids: np.ndarray
    tensors: dict[str, torch.Tensor]
    real: int
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, field: str) -> torch.Tensor:
        if field not in self.tensors:
            known = ", ".join(self.tensors)
            raise UserError(
                f"the data have no field '{field}'{nearest(field, self.tensors)} (there are {known})"
            )
        return self.tensors[field]

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory, from which copies to a GPU need not wait."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return replace(
            self, tensors={name: change(tensor) for name, tensor in self.tensors.items()}
        )


@dataclass(frozen=True)
class Stream:
    """Samples in an order, and how they become tensors."""

    order: Ordering
    assembler: Assembler

    @property
    def samples(self) -> int:
        return len(self.assembler.shards)


class TrainingBatches:
    """The endless training batches of one rank: of the M micro-batches of a step it holds [rM / W, (r + 1)M / W).

    Step t takes the places [t * B, (t + 1) * B) of the endless order of each stream, so batches straddle epochs and are
    all full. The only stream is called ''. With `together` the streams' fields stand side by side, as
    (b, streams, ...), without the stream's name. UserError, with what would divide, when shares are not equal.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        device: str = "cpu",
        together: bool = False,
    ) -> None:
        own = _share(global_batch, micro_batch, rank, world_size)
        self.streams, self.global_batch = dict(streams), global_batch
        self._make = _TrainingStep(self.streams, global_batch, micro_batch, own)
        self._ahead = Ahead(self._make, workers, prefetch)
        self._done = _Finish({name: one.assembler for name, one in streams.items()}, device)
        self._together = list(streams) if together else []

    @property
    def epoch(self) -> int:
        """How many places an epoch has: that of the longest stream."""
        return max(stream.order.size for stream in self.streams.values())

    def ids(self, step: int) -> np.ndarray:
        """The ids of the whole global batch of `step`, in order: the same on every rank."""
        start = step * self.global_batch
        return _columns(
            [
                stream.order.at(start, start + self.global_batch)[1]
                for stream in self.streams.values()
            ]
        )

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of `step`."""
        return [self._finish(micro) for micro in self._make(step)]

    def _finish(self, micro: MicroBatch) -> MicroBatch:
        micro = self._done(micro)
        return _side_by_side(micro, self._together) if self._together else micro

    def from_(self, step: int, stop: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield (step, this rank's micro-batches) for the steps [step, stop)."""
        steps = range(step, stop)
        made = _fetched(self._make.needs, self._ahead, steps)
        for now, micros in zip(steps, made, strict=True):
            yield now, [self._finish(micro) for micro in micros]


@dataclass(frozen=True)
class _TrainingStep:
    streams: dict[str, Stream]
    global_batch: int
    micro_batch: int
    own: range

    def places(self, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(epochs, ids) of this rank's rows of each stream."""
        start = step * self.global_batch + self.own.start * self.micro_batch
        return {
            name: stream.order.at(start, start + len(self.own) * self.micro_batch)
            for name, stream in self.streams.items()
        }

    def needs(self, step: int) -> list[Need]:
        """What this rank's rows fetch from elsewhere."""
        return [
            need
            for name, (_, ids) in self.places(step).items()
            for need in self.streams[name].assembler.shards.needs(ids)
        ]

    def __call__(self, step: int) -> list[MicroBatch]:
        size = self.micro_batch
        places = self.places(step)
        micros = []
        for number, index in enumerate(self.own):
            rows = slice(number * size, (number + 1) * size)
            tensors = {
                name: stream.assembler.tensors(places[name][1][rows], places[name][0][rows])
                for name, stream in self.streams.items()
            }
            ids = _columns([ids[rows] for _, ids in places.values()])
            micros.append(MicroBatch(index, ids, _joined(tensors), size))
        return micros


class EvaluationBatches:
    """Each sample of a split once, over all ranks: micro-batch i on rank i % W, the same number of them on each.

    Several streams are taken in step, sample i of each, and so must be equally long.
    """

    def __init__(
        self,
        assemblers: Mapping[str, Assembler],
        *,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        device: str = "cpu",
    ) -> None:
        lengths = {name: len(assembler.shards) for name, assembler in assemblers.items()}
        self.samples = samples = next(iter(lengths.values()))
        if set(lengths.values()) != {samples}:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(
                f"evaluate: the streams have unequal numbers of samples ({told}); "
                "evaluation takes sample i of each"
            )
        self.samples = samples
        total = -(-samples // micro_batch)
        self.places = range(rank, -(-total // world_size) * world_size, world_size)
        self._make = _EvaluationPart(dict(assemblers), micro_batch, samples)
        self._ahead = Ahead(self._make, workers, prefetch)
        self._finish = _Finish(assemblers, device)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from map(self._finish, _fetched(self._make.needs, self._ahead, self.places))


@dataclass(frozen=True)
class _EvaluationPart:
    """Micro-batch `index` of a split; what lies beyond its end is sample 0 again, and does not count."""

    assemblers: dict[str, Assembler]
    micro_batch: int
    samples: int

    def ids(self, index: int) -> tuple[np.ndarray, int]:
        ids = np.arange(index * self.micro_batch, (index + 1) * self.micro_batch, dtype=np.int64)
        inside = ids < self.samples
        return np.where(inside, ids, 0), int(inside.sum())

    def needs(self, index: int) -> list[Need]:
        """What micro-batch `index` fetches from elsewhere."""
        ids, _ = self.ids(index)
        return [need for one in self.assemblers.values() for need in one.shards.needs(ids)]

    def __call__(self, index: int) -> MicroBatch:
        ids, real = self.ids(index)
        epochs = np.full(len(ids), EVALUATION, dtype=np.int64)
        tensors = {name: one.tensors(ids, epochs) for name, one in self.assemblers.items()}
        return MicroBatch(index, _columns([ids] * len(tensors)), _joined(tensors), real)


@dataclass(frozen=True)
class _Finish:
    """Brings micro-batches to the device, if their images are transformed there, and does that."""

    assemblers: Mapping[str, Assembler]
    device: str

    def __call__(self, micro: MicroBatch) -> MicroBatch:
        if not any(one.on_device for one in self.assemblers.values()):
            return micro
        micro = micro.to(self.device)
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.assemblers}
        for key, tensor in micro.tensors.items():
            stream, _, name = key.rpartition(".") if "" not in parts else ("", "", key)
            parts[stream][name] = tensor
        finished = {name: one.finish(parts[name]) for name, one in self.assemblers.items()}
        return replace(micro, tensors=_joined(finished))


def training_batches(
    shards: Shards,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    transforms: Sequence[Transform] = (),
    scale: str = "standard",
    order: Ordering | None = None,
    workers: int = 0,
    prefetch: int = 2,
    device: str | None = None,
) -> TrainingBatches:
    """The training batches of one rank from one set of shards, by default shuffled globally.

    With a `device` images are transformed and scaled there, a batch at a time.
    """
    order = order or Order(len(shards), seed)
    assembler = Assembler(shards, seed, transforms, scale, on_device=device is not None)
    return TrainingBatches(
        {"": Stream(order, assembler)},
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
        prefetch=prefetch,
        device=device or "cpu",
    )


def evaluation_batches(
    shards: Shards,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    transforms: Sequence[Transform] = (),
    scale: str = "standard",
    workers: int = 0,
) -> EvaluationBatches:
    """The evaluation batches of one rank from one set of shards."""
    return EvaluationBatches(
        {"": Assembler(shards, 0, transforms, scale)},
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def _share(global_batch: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The numbers of the micro-batches of a step that belong to a rank."""
    if global_batch % micro_batch:
        raise UserError(
            f"data.micro_batch {micro_batch} does not divide data.global_batch {global_batch}; "
            f"these do: {_divisors(global_batch)}"
        )
    total = global_batch // micro_batch
    if total % world_size:
        sizes = ", ".join(
            str(size)
            for size in range(1, global_batch + 1)
            if global_batch % (size * world_size) == 0
        )
        raise UserError(
            f"{total} micro-batches ({global_batch} / {micro_batch}) do not share out over {world_size} ranks; "
            f"ranks that divide: {_divisors(total)}; data.micro_batch for {world_size} ranks: {sizes or 'none'}"
        )
    share = total // world_size
    return range(rank * share, (rank + 1) * share)


def _fetched(
    needs: Callable[[int], list[Need]], items: Callable[[range], Iterator[Any]], places: range
) -> Iterator[Any]:
    """The items of `places`; what they need from elsewhere is fetched ahead of them."""
    if not places or not needs(places[0]):
        yield from items(places)
        return
    with Prefetch(needs, places) as prefetch:
        for place, item in zip(places, items(places), strict=True):
            prefetch.reached(place)
            yield item


def _columns(ids: list[np.ndarray]) -> np.ndarray:
    """The ids of one stream (b,), of several (b, streams)."""
    return ids[0] if len(ids) == 1 else np.stack(ids, axis=1)


def _joined(streams: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The fields of all streams, with the stream before the field where it has a name."""
    return {
        f"{stream}.{name}" if stream else name: tensor
        for stream, tensors in streams.items()
        for name, tensor in tensors.items()
    }


def _side_by_side(micro: MicroBatch, streams: Sequence[str]) -> MicroBatch:
    """Each field once, with an axis of streams after that of the rows: (b, streams, ...)."""
    fields = [name.partition(".")[2] for name in micro.tensors if name.startswith(f"{streams[0]}.")]
    tensors = {}
    for name in fields:
        parts = [micro.tensors[f"{stream}.{name}"] for stream in streams]
        if len({part.shape for part in parts}) > 1:
            raise UserError(
                f"members: their batches of '{name}' have unequal shapes, expected samples of one size"
            )
        tensors[name] = torch.stack(parts, dim=1)
    return replace(micro, tensors=tensors)


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
