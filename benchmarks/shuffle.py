"""How well an epoch is shuffled: ours, webdataset's shuffle(1000), mosaic-streaming's, and a true permutation.

    python benchmarks/shuffle.py [--shards 128] [--samples 1000] [--epochs 5] [--json]

The set is the worst there is: its samples lie sorted by class, so that a shard holds one class, as when folders are
packed one after the other. For the sequences of shard and class numbers of an epoch it gives

- the serial correlation at lag 1 (a true permutation: 0 within about 1 / sqrt(samples));
- how many of the 16 classes a batch of 64 holds (a true permutation: 15.7);
- the correlation of place and shard number (a true permutation: 0).

All orders are taken from the libraries themselves; webdataset has its shards shuffled, too. `make peers` installs them.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import random
import sys
import types
from collections.abc import Callable

import numpy as np

from dist_train.data_shards.order import Order

CLASSES = 16
BATCH = 64


def ours(shards: int, samples: int, **settings) -> Callable[[int], np.ndarray]:
    sizes = [samples] * shards
    order = Order(shards * samples, 0, shards=sizes, batch=BATCH, **settings)
    return lambda epoch: order.at(epoch * order.size, (epoch + 1) * order.size)[1]


def webdataset(shards: int, samples: int) -> Callable[[int], np.ndarray]:
    from webdataset.filters import _shuffle

    def order(epoch: int) -> np.ndarray:
        rng = random.Random(epoch)
        urls = list(range(shards))
        rng.shuffle(urls)
        ids = (shard * samples + i for shard in urls for i in range(samples))
        return np.fromiter(_shuffle(ids, bufsize=1000, initial=100, rng=rng), np.int64)

    return order


def streaming(shards: int, samples: int, name: str) -> Callable[[int], np.ndarray]:
    if importlib.util.find_spec("torchvision") is None:
        import transformers  # noqa: F401  # which must not see the stand-ins

        for part in ("", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder"):
            module = _Absent(f"torchvision{part}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            sys.modules[module.__name__] = module
    from streaming.base.shuffle import get_shuffle

    sizes = np.full(shards, samples)
    return lambda epoch: get_shuffle(name, sizes, 1, 0, epoch)


class _Absent(types.ModuleType):
    """A module of which only the names are needed: streaming imports torchvision, its shuffles do not use it."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def permutation(shards: int, samples: int) -> Callable[[int], np.ndarray]:
    return lambda epoch: np.random.default_rng(epoch).permutation(shards * samples)


def figures(ids: np.ndarray, shards: int, samples: int) -> dict[str, float]:
    """What an epoch's order `ids` looks like."""
    assert np.array_equal(np.sort(ids), np.arange(shards * samples))
    shard = ids // samples
    label = shard * CLASSES // shards
    batches = label[: len(label) // BATCH * BATCH].reshape(-1, BATCH)
    return {
        "shard_lag_1": _correlation(shard[:-1], shard[1:]),
        "class_lag_1": _correlation(label[:-1], label[1:]),
        "classes_a_batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
        "place_shard": _correlation(np.arange(len(shard)), shard),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def measure(shards: int, samples: int, epochs: int) -> dict[str, dict[str, float] | str]:
    """Means over epochs; of correlations the mean size."""
    contenders = {
        "a true permutation": permutation,
        "ours, global": lambda *a: ours(*a),
        "ours, window of 16 shards": lambda *a: ours(*a, shuffle="window", window=16),
        "ours, window of 64 shards, 64 streams": lambda *a: ours(
            *a, shuffle="window", window=64, streams=64
        ),
        "ours, none": lambda *a: ours(*a, shuffle="none"),
        "webdataset, shuffle(1000)": webdataset,
        **{
            f"mosaic-streaming, {name}": lambda *a, name=name: streaming(*a, name)
            for name in ("py1e", "py1br", "py1s")
        },
    }
    results: dict[str, dict[str, float] | str] = {}
    for title, make in contenders.items():
        try:
            order = make(shards, samples)
        except ImportError as error:
            results[title] = f"not installed ({error}): make peers"
            continue
        rows = [figures(np.asarray(order(epoch)), shards, samples) for epoch in range(epochs)]
        results[title] = {key: float(np.mean([abs(row[key]) for row in rows])) for key in rows[0]}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1000, help="samples a shard")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(options.shards, options.samples, options.epochs)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.shards} shards of {options.samples} samples, means of {options.epochs} epochs")
    print(f"{'order':40} shard lag 1   class lag 1   classes a batch   place-shard")
    for title, row in results.items():
        if isinstance(row, str):
            print(f"{title:40} {row}")
        else:
            print(
                f"{title:40} {row['shard_lag_1']:11.4f}   {row['class_lag_1']:11.4f}   "
                f"{row['classes_a_batch']:15.2f}   {row['place_shard']:11.4f}"
            )


if __name__ == "__main__":
    main()
