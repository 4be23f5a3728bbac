"""Batches: which samples go where is decided here (laws 1 to 3), and no rank or worker can change what they hold."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_train.data_shards.order import Order
from dist_train.data_shards.reader import Shards
from dist_train.errors import UserError, nearest

EVALUATION = -1
"""The epoch whose draws evaluation transforms use."""
SCALES = ("standard", "signed", "unit")
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


@dataclass
class MicroBatch:
    """The unit of forward and backward. Every tensor has len(ids) rows, of which the first `real` count.

    `tensors` may hold image (b, C, H, W) float32, label (b,) int64, tokens (b, T + 1) int64 padded right with 0, with
    length (b,) int64, the number of targets of each row; and arrays under their own names.
    """

    index: int
    ids: np.ndarray
    tensors: dict[str, torch.Tensor]
    real: int

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


class TrainingBatches:
    """The endless training stream of one rank. Made by `training_batches`."""

    def __init__(
        self, assembler: Assembler, order: Order, global_batch: int, own: range, workers: int
    ) -> None:
        self.assembler = assembler
        self.order = order
        self.global_batch = global_batch
        self.own = own
        self.workers = workers

    def ids(self, step: int) -> np.ndarray:
        """The ids of the whole global batch of `step`, in order: the same on every rank."""
        return self.order.at(step * self.global_batch, (step + 1) * self.global_batch)[1]

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of `step`."""
        epochs, ids = self.order.at(step * self.global_batch, (step + 1) * self.global_batch)
        size = self.assembler.micro_batch
        rows = [slice(index * size, (index + 1) * size) for index in self.own]
        return [
            self.assembler.micro(index, ids[row], epochs[row], size)
            for index, row in zip(self.own, rows, strict=True)
        ]

    def from_(self, step: int, stop: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield (step, this rank's micro-batches) for the steps [step, stop)."""
        steps = range(step, stop)
        yield from zip(steps, _items(self.batch, steps, self.workers), strict=True)


class EvaluationBatches:
    """Each sample of a split once, over all ranks. Made by `evaluation_batches`."""

    def __init__(self, assembler: Assembler, rank: int, world_size: int, workers: int) -> None:
        self.assembler = assembler
        total = -(-len(assembler.shards) // assembler.micro_batch)
        self.places = range(rank, -(-total // world_size) * world_size, world_size)
        self.workers = workers

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, index: int) -> MicroBatch:
        """Micro-batch `index` of the split; what lies beyond its end is sample 0 again, and does not count."""
        size = self.assembler.micro_batch
        ids = np.arange(index * size, (index + 1) * size, dtype=np.int64)
        inside = ids < len(self.assembler.shards)
        epochs = np.full(size, EVALUATION, dtype=np.int64)
        return self.assembler.micro(index, np.where(inside, ids, 0), epochs, int(inside.sum()))

    def __iter__(self) -> Iterator[MicroBatch]:
        return _items(self.batch, self.places, self.workers)


def training_batches(
    shards: Shards,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    transforms: Sequence[Transform] = (),
    workers: int = 0,
    scale: str = "standard",
) -> TrainingBatches:
    """The training batches of one rank: of the M micro-batches of a step it holds [rank * M / W, (rank + 1) * M / W).

    Step t takes the places [t * B, (t + 1) * B) of the endless order, so batches straddle epochs and are all full.
    UserError, with what would divide, when the shares of micro-batches or ranks are not equal.
    """
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
    return TrainingBatches(
        Assembler(shards, seed, micro_batch, tuple(transforms), scale),
        Order(len(shards), seed),
        global_batch,
        range(rank * share, (rank + 1) * share),
        workers,
    )


def evaluation_batches(
    shards: Shards,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    transforms: Sequence[Transform] = (),
    workers: int = 0,
    scale: str = "standard",
) -> EvaluationBatches:
    """The micro-batches i of the split with i % world_size == rank; every rank yields the same number of them."""
    return EvaluationBatches(
        Assembler(shards, 0, micro_batch, tuple(transforms), scale), rank, world_size, workers
    )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


# ---------------------------------------------------------------------------------------------------------------------
# From ids to tensors


class Assembler:
    """Turns ids into a MicroBatch: reads, transforms with each sample's own generator, scales, pads, stacks."""

    def __init__(
        self,
        shards: Shards,
        seed: int,
        micro_batch: int,
        transforms: tuple[Transform, ...],
        scale: str,
    ) -> None:
        if scale not in SCALES:
            raise UserError(
                f"data.scale '{scale}'{nearest(scale, SCALES)} (use {', '.join(SCALES)})"
            )
        self.shards = shards
        self.seed = seed
        self.micro_batch = micro_batch
        self.transforms = transforms
        self.scale = scale
        self.kinds = {
            spec.name: spec.kind
            for spec in shards.index.fields.values()
            if spec.kind in ("image", "array", "tokens", "label")
        }

    def micro(self, index: int, ids: np.ndarray, epochs: np.ndarray, real: int) -> MicroBatch:
        """Micro-batch number `index` of the samples `ids` (b,), drawn for `epochs` (b,)."""
        if self.transforms:
            pairs = zip(ids.tolist(), epochs.tolist(), strict=True)
            samples = [self._transformed(i, epoch) for i, epoch in pairs]
            columns = {name: [sample[name] for sample in samples] for name in self.kinds}
        else:
            columns = {name: self.shards.column(name, ids) for name in self.kinds}
        tensors: dict[str, torch.Tensor] = {}
        for name, kind in self.kinds.items():
            if kind == "label":
                tensors[name] = torch.tensor(columns[name], dtype=torch.int64)
            elif kind == "tokens":
                tensors[name], tensors["length"] = _padded(columns[name])
            else:
                stacked = self._stacked(name, columns[name], ids)
                tensors[name] = self._scaled(name, stacked) if kind == "image" else stacked
        return MicroBatch(index, ids, tensors, real)

    def _transformed(self, i: int, epoch: int) -> dict[str, Any]:
        sample = self.shards.sample(i, tuple(self.kinds))
        rng = keyed_generator(self.seed, epoch, i)
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample

    def _stacked(self, name: str, values: Any, ids: np.ndarray) -> torch.Tensor:
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values)
        for i, value in zip(ids.tolist(), values, strict=True):
            if value.shape != values[0].shape:
                raise UserError(
                    f"{self.shards.where(i)}, field '{name}': has shape {value.shape}, "
                    f"another of its batch {values[0].shape}; bring them to one shape when packing, or crop"
                )
        return torch.from_numpy(np.stack(values))

    def _scaled(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """(b, H, W) or (b, H, W, C) uint8 -> (b, C, H, W) float32."""
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(3, 1)
        scaled = images.to(torch.float32, memory_format=torch.contiguous_format)
        if self.scale == "unit":
            return scaled.div_(255)
        if self.scale == "signed":
            return scaled.sub_(127.5).div_(127.5)
        statistics = self.shards.index.statistics.get(name, {"mean": [], "std": []})
        if len(statistics["mean"]) != images.shape[1]:
            raise UserError(
                f"{self.shards.folder}: no statistics of {images.shape[1]} channels in index.json; "
                "use data.scale unit or signed"
            )
        mean = torch.tensor(statistics["mean"]).view(-1, 1, 1)
        std = torch.tensor([value or 1.0 for value in statistics["std"]]).view(-1, 1, 1)
        return scaled.div_(255).sub_(mean).div_(std)


def keyed_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of law 2 for the data: the same draws for (seed, epoch, sample) on any rank, in any worker."""
    key = np.array([seed, epoch], dtype=np.int64).view(np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, sample], np.uint64))
    )


def _padded(pieces: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of unequal length -> (b, longest) int64 padded right with 0, and their numbers of targets (b,)."""
    lengths = [len(piece) for piece in pieces]
    if isinstance(pieces, np.ndarray):
        tokens = pieces.astype(np.int64)
    else:
        tokens = np.zeros((len(pieces), max(lengths)), np.int64)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece)] = piece
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Workers


class _Items(Dataset):
    """What a DataLoader reads: item `place` is `make(place)`, or the message of the UserError that it raised."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, place: int) -> Any:
        try:
            return self.make(place)
        except UserError as error:
            return str(
                error
            )  # raised again in the main process, without a worker's traceback around it


def _items(make: Callable[[int], Any], places: range, workers: int) -> Iterator[Any]:
    """Yield make(place) for each place, in order, made ahead by worker processes if there are any.

    The workers live as long as this generator. Nothing else may hold the loader: where the garbage collector has to
    break a cycle, it closes the queues before the workers have heard of the end, which costs 5 seconds.
    """
    leaving = RawValue(ctypes.c_bool, False)
    loader: DataLoader = DataLoader(
        _Items(make),
        sampler=places,
        batch_size=None,
        num_workers=min(workers, len(places)),
        collate_fn=_as_it_is,
        worker_init_fn=functools.partial(_ignore_signals, leaving),
        generator=torch.Generator(),  # else the loader draws its seed from the default generator
        pin_memory=torch.cuda.is_available(),
    )
    Finalize(loader, setattr, args=(leaving, "value", True), exitpriority=0)
    for item in loader:
        if isinstance(item, str):
            raise UserError(item)
        yield item


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_signals(leaving: Any, worker: int) -> None:
    """The trainer decides what a signal means; a worker ends when the trainer says so, or is gone.

    Only once the trainer is `leaving` is a SIGTERM its own: at exit multiprocessing sends one to each child, and waits.
    """

    def terminate(number: int, frame: Any) -> None:
        if leaving.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
