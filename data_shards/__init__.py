"""Tar shards in, batches out: write, index, order, read, transform, load. Usable without the rest of dist-train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.data_shards.index import Index as Index
    from dist_train.data_shards.loader import MicroBatch as MicroBatch
    from dist_train.data_shards.loader import evaluation_batches as evaluation_batches
    from dist_train.data_shards.loader import training_batches as training_batches
    from dist_train.data_shards.order import Order as Order
    from dist_train.data_shards.reader import Shards as Shards
    from dist_train.data_shards.shard_loader import ShardLoader as ShardLoader
    from dist_train.data_shards.sources import pack as pack
    from dist_train.data_shards.write import split_of as split_of
    from dist_train.data_shards.write import write_shards as write_shards

_ROOMS = {
    "Index": "index",
    "MicroBatch": "loader",
    "Order": "order",
    "ShardLoader": "shard_loader",
    "Shards": "reader",
    "evaluation_batches": "loader",
    "pack": "sources",
    "split_of": "write",
    "training_batches": "loader",
    "write_shards": "write",
}


def __getattr__(name: str) -> Any:
    """What is used is imported when it is asked for: `dist-train --help` must not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"dist_train.data_shards has no '{name}'")
    return getattr(importlib.import_module(f"dist_train.data_shards.{_ROOMS[name]}"), name)
