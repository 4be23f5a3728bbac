"""What an index of a thousand million samples costs a rank: memory, and the time to find what a step holds.

    python benchmarks/index.py [--shards 100000] [--samples 10000]

The index is synthetic: 100,000 shards of 10,000 samples, with random digests. No tar is opened, so the memory of the
tables of offsets, which are mapped and shared, is not in it. Memory is what reading the index adds to a process that
has imported torch; seeking is to find the ids of a batch of 256 at a random step, their shards and their rows.
"""

import argparse
import gc
import secrets
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dist_train.data_shards.index import Field, Index, Shard
from dist_train.data_shards.reader import Shards


def resident() -> float:
    """Megabytes of this process in memory now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="samples a shard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        writer = get_context("fork").Process(
            target=_write, args=(folder, options.shards, options.samples)
        )  # whose garbage is not ours
        writer.start()
        writer.join()
        before, start = resident(), time.perf_counter()
        shards = Shards(folder, "train", Index.read(folder))
        opened = time.perf_counter() - start
        gc.collect()
        after = resident()
        print(f"{len(shards):,} samples in {options.shards:,} shards: opened in {opened:.2f} s")
        print(f"memory: {after:,.0f} MB, of which the index {after - before:,.0f} MB")
        for shuffle in ("global", "window"):
            order = shards.order(0, 256, shuffle=shuffle, streams=64)
            start = time.perf_counter()
            order.at(0, 256)
            first = time.perf_counter() - start
            times = []
            for step in np.random.default_rng(0).integers(0, len(shards) // 256, 200).tolist():
                start = time.perf_counter()
                shards._rows(order.at(step * 256, (step + 1) * 256)[1])
                times.append(time.perf_counter() - start)
            print(
                f"{shuffle}: the first step of an epoch {first * 1e3:.1f} ms, any other "
                f"{statistics.median(times) * 1e3:.2f} ms (largest {max(times) * 1e3:.2f} ms)"
            )


def _write(folder: Path, shards: int, samples: int) -> None:
    made = [
        Shard(
            f"set-train-{n:06d}.tar", samples, 1 << 28, secrets.token_hex(32), secrets.token_hex(32)
        )
        for n in range(shards)
    ]
    index = Index("set", {"x.npy": Field("x", "array", "uint8", [3072])}, {"train": made})
    index.save(folder)


if __name__ == "__main__":
    main()
