"""Shards for any PyTorch loop: a loader with `state_dict` that goes on exactly, on other ranks too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import IterableDataset

from dist_train.data_shards.assembler import Transform
from dist_train.data_shards.cache import Cache
from dist_train.data_shards.index import Index
from dist_train.data_shards.loader import MicroBatch, training_batches
from dist_train.data_shards.order import Bootstrap, Ordering
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.remote import is_remote
from dist_train.data_shards.sizes import bytes_of
from dist_train.data_shards.storage import Bucket
from dist_train.errors import UserError


class ShardLoader(IterableDataset):
    """The training batches of one rank, one a step: `for batch in loader: batch["image"]`.

    Each `for` goes through the rest of the present epoch; the next one goes on with the next. Every rank has the same
    number of steps, each of `global_batch` / `world_size` rows. What a step holds depends on the arguments but `rank`,
    `world_size`, `workers`, `prefetch` and the cache: these may differ when `load_state_dict` goes on.

    Args:
        path: a folder of shards, or an https, s3 or gs address; then `index`, `cache` and `cache_size` are as in a
            recipe's `data`.
        rank, world_size: by default those of torch.distributed, if it is initialised.
        device: where images are transformed and scaled, a batch at a time; by default on the CPU, sample by sample.
        shuffle, window, streams: see `Order`. bootstrap: draw with replacement, by this seed.
        on_damage: "skip" leaves what is damaged out of the index of a folder, see `Index.load`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        global_batch: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        transforms: Sequence[Transform] = (),
        scale: str = "standard",
        device: str | None = None,
        shuffle: str = "auto",
        window: int = 16,
        streams: int | str = "auto",
        bootstrap: int | None = None,
        on_damage: str = "stop",
        index: str = "",
        cache: str | Path = "~/.cache/dist-train/shards",
        cache_size: str = "64 GiB",
    ) -> None:
        if (rank is None) != (world_size is None):
            raise UserError(f"rank {rank}, world_size {world_size}: give both or neither")
        if rank is None or world_size is None:
            joined = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        if global_batch % world_size:
            raise UserError(
                f"global_batch {global_batch} does not share out over {world_size} ranks"
            )
        if is_remote(str(path)):
            kept = Cache(Path(cache).expanduser(), bytes_of(cache_size))
            self.shards = Shards.remote(Bucket(str(path), kept, index), split)
        else:
            self.shards = Shards(path, split, Index.load(path, on_damage))
        order: Ordering = self.shards.order(
            seed, global_batch, shuffle=shuffle, window=window, streams=streams
        )
        if bootstrap is not None:
            order = Bootstrap(order, bootstrap)
        self.batches = training_batches(
            self.shards,
            seed=seed,
            global_batch=global_batch,
            micro_batch=global_batch // world_size,
            rank=rank,
            world_size=world_size,
            transforms=transforms,
            scale=scale,
            order=order,
            workers=workers,
            prefetch=prefetch,
            device=device,
        )
        self.step = 0
        self._same = {
            "fingerprint": self.shards.index.fingerprint,
            "split": split,
            "seed": seed,
            "global_batch": global_batch,
            "shuffle": shuffle,
            "window": window,
            "streams": streams,
            "bootstrap": bootstrap,
        }

    @property
    def epoch(self) -> int:
        """The epoch that the next step begins in."""
        return self.step * self.batches.global_batch // len(self.shards)

    def __len__(self) -> int:
        """How many steps the next `for` takes."""
        end = -(-(self.epoch + 1) * len(self.shards) // self.batches.global_batch)
        return end - self.step

    def __iter__(self) -> Iterator[MicroBatch]:
        for step, (batch,) in self.batches.from_(self.step, self.step + len(self)):
            self.step = step + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: after the batch that it gave last."""
        return {"step": self.step, **self._same}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood. UserError if its batches were others."""
        for key, value in self._same.items():
            if state.get(key) != value:
                raise UserError(
                    f"the state is of a loader with {key} {state.get(key)!r}, this one has {value!r}"
                )
        self.step = int(state["step"])
