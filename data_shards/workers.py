"""Processes that make items ahead of the one that uses them."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dist_train.errors import UserError

PLENTY = 1 << 30
PLENTY_OF_FILES = 8192
OTHER_FILES = 256
"""What the rest of a process may have open."""


class Ahead:
    """Makes items ahead of their use, in `workers` processes that live as long as this object.

    `make(place)` must be the same in every process. With no workers the items are made when they are asked for. So
    they are where the machine has too little shared memory or too few open files for what is under way: a note in the
    log says so.
    """

    def __init__(self, make: Callable[[int], Any], workers: int, prefetch: int = 2) -> None:
        self.make, self.workers, self.prefetch = make, workers, prefetch
        self._places = _Places()
        self._loader: DataLoader | None = None
        self._iterations = 0

    def __call__(self, places: range) -> Iterator[Any]:
        """Yield make(place) for each place, in order. Only one such iteration at a time."""
        if self._loader is None and len(places):
            self._loader = self._start(places)
        self._iterations += 1
        mine = self._iterations
        self._places.places = places
        for item in self._loader or ():
            if mine != self._iterations:
                raise RuntimeError(
                    "another iteration over these batches has begun; this one is over"
                )
            if isinstance(item, str):
                raise UserError(item)
            yield item

    def _start(self, places: range) -> DataLoader:
        workers = min(self.workers, len(places))
        if workers:
            short = _shortage(self.make, places[0], (workers * self.prefetch + 1))
            if short:
                logging.getLogger("dist_train").warning(
                    "data.workers %d: %s: batches are made without workers", self.workers, short
                )
                workers = 0
        leaving = RawValue(ctypes.c_bool, False)
        loader: DataLoader = DataLoader(
            _Items(self.make),
            sampler=self._places,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=functools.partial(_ignore_signals, leaving),
            generator=torch.Generator(),  # else the loader draws its seed from the default generator
            pin_memory=torch.cuda.is_available(),
        )
        Finalize(loader, setattr, args=(leaving, "value", True), exitpriority=0)
        return loader


class _Places(Sampler):
    """The places of the present iteration."""

    places = range(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


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


def _shortage(make: Callable[[int], Any], place: int, items: int) -> str:
    """What this machine has too little of to keep so many items under way between processes, or ''.

    Each tensor under way is a file in /dev/shm, and open. Where both are plentiful no item is made to find out.
    """
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else PLENTY
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if free >= PLENTY and files >= PLENTY_OF_FILES:
        return ""
    try:
        tensors = list(_tensors(make(place)))
    except UserError:
        return ""  # the iteration will raise it
    need = items * sum(tensor.nbytes for tensor in tensors)
    if need > free:
        return (
            f"{need:,} bytes of shared memory are needed, /dev/shm has {free:,} (a larger one, as with "
            "docker --shm-size, or a smaller data.prefetch)"
        )
    need = items * len(tensors) + OTHER_FILES
    if need > files:
        if most != resource.RLIM_INFINITY and need > most:
            return f"{need} open files are needed, {most} are allowed (ulimit -n)"
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))
    return ""


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    for micro in item if isinstance(item, list) else [item]:
        yield from micro.tensors.values()


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
