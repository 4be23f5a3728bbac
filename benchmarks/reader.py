"""Samples a second from local tar shards in page cache, beside a raw read of the same bytes and webdataset.

    python benchmarks/reader.py [--samples 20000] [--size 3072] [--rounds 5] [--json]

One process, one core. The contenders take turns (interleaved rounds), so that whatever else the machine does hits all
alike; the figure of each is its median. Every byte of a sample is copied by each contender. Ours and the raw read go in
the permuted order of training; webdataset and tarfile can only go in the order of the file.
"""

import argparse
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dist_train.data_shards.order import Order
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.write import write_shards


def build(folder: Path, samples: int, size: int) -> Shards:
    """Write `samples` samples, each of one array of `size` bytes and a label, in about 8 shards."""
    rng = np.random.default_rng(0)

    def rows():
        for i in range(samples):
            yield (
                "train",
                f"{i:08d}",
                {"x.npy": rng.integers(0, 256, size, np.uint8), "cls": i % 10},
            )

    write_shards(folder, "bench", rows(), shard_size=-(-samples // 8))
    return Shards(folder, "train")


def contenders(shards: Shards) -> dict[str, Callable[[], int]]:
    """Each reads the whole set once and returns how many bytes it got."""
    count = len(shards)
    order = Order(count, 0)
    batch = 256
    paths = [shards.folder / shard.file for shard in shards.shards]
    files = [path.open("rb") for path in paths]
    tables = [np.load(path.with_suffix(".index.npy")).reshape(-1, 4).tolist() for path in paths]
    places = [
        (file.fileno(), *row) for file, table in zip(files, tables, strict=True) for row in table
    ]
    keep_open = files

    def raw_read() -> int:
        total = 0
        for i in order.at(0, count)[1].tolist():
            file, label_at, label_size, array_at, array_size = places[i]
            total += len(os.pread(file, label_size, label_at))
            total += len(os.pread(file, array_size, array_at))
        assert keep_open
        return total

    def ours_raw() -> int:
        total = 0
        for start in range(0, count, batch):
            for i in order.at(start, min(start + batch, count))[1].tolist():
                for view in shards.raw(i).values():
                    total += len(bytes(view))
        return total

    def ours_decoded() -> int:
        total = 0
        for start in range(0, count, batch):
            ids = order.at(start, min(start + batch, count))[1]
            total += shards.column("x", ids).nbytes + len(shards.column("label", ids))
        return total

    def plain_tarfile() -> int:
        total = 0
        for path in paths:
            with tarfile.open(path) as archive:
                for member in archive:
                    total += len(archive.extractfile(member).read())  # type: ignore[union-attr]
        return total

    def webdataset() -> int:
        import webdataset as wds

        urls = [str(path) for path in paths]
        return sum(
            len(sample["x.npy"]) + len(sample["cls"])
            for sample in wds.WebDataset(urls, shardshuffle=False)
        )

    return {
        "ours, raw": ours_raw,
        "ours, decoded in batches": ours_decoded,
        "raw read (pread, same order)": raw_read,
        "webdataset": webdataset,
        "tarfile": plain_tarfile,
    }


def measure(samples: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median samples a second of each contender, and ours over each as a ratio of the same rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        run = contenders(build(Path(scratch) / "set", samples, size))
        speeds: dict[str, list[float]] = {name: [] for name in run}
        for number in range(rounds + 1):
            for name, read in run.items():
                start = time.perf_counter()
                read()
                if number > 0:  # the first round warms the page cache
                    speeds[name].append(samples / (time.perf_counter() - start))
    ours = speeds["ours, raw"]
    return {
        name: {
            "samples_per_second": statistics.median(values),
            "ours_over_this": statistics.median(a / b for a, b in zip(ours, values, strict=True)),
        }
        for name, values in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=3072, help="bytes of a sample's array")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(options.samples, options.size, options.rounds)
    if options.json:
        print(json.dumps({"samples": options.samples, "size": options.size, "results": results}))
        return
    print(f"{options.samples} samples of {options.size} bytes, median of {options.rounds} rounds")
    for name, row in results.items():
        print(
            f"{name:30} {row['samples_per_second']:12,.0f} samples/s   ours is {row['ours_over_this']:6.2f} x"
        )


if __name__ == "__main__":
    main()
