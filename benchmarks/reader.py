"""Samples a second from local tar shards in page cache, beside the limit of the machine and the other readers.

    python benchmarks/reader.py [--seconds 2] [--rounds 7] [--kinds 3KB 100KB JPEG packed] [--json]

One process. The contenders take turns (interleaved rounds), so that whatever else the machine does hits all alike; the
figure of each is its median, a ratio the median of the ratios of the same rounds. `make peers` installs those that are
not in .venv; run it with .peers/bin/python then.

| kind | a sample | the limit |
|---|---|---|
| 3KB, 100KB | an array of that many bytes and a label | raw read: os.pread of the same bytes, in the same order |
| JPEG | a picture of 160 x 160 and a label | bare decoder: simplejpeg on the same bytes, in a list; 1 thread, as ours |
| packed | a row of 64 bytes and a label, 4,096 in a block | raw read: os.read of the whole tars, and no samples made |

Ours gives batches of 256 arrays, globally shuffled or in the order of the files; the others give one sample after the
other in the order of the files: bytes, for JPEG decoded pictures. litdata reads its own format, of the same content.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dist_train.data_shards.order import Order
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.write import write_shards

BATCH = 256
SIZES = {"3KB": 3 << 10, "100KB": 100 << 10, "JPEG": 0, "packed": 64}
COUNTS = {"3KB": 20_000, "100KB": 2_000, "JPEG": 2_000, "packed": 400_000}
Contender = Callable[[], int]
"""Reads the whole set once and returns how many samples it got."""


def samples(kind: str) -> Iterator[tuple[str, bytes | np.ndarray]]:
    """(suffix, content) of each sample; pictures are noise of few frequencies, which compress as photographs do."""
    rng = np.random.default_rng(0)
    for _ in range(COUNTS[kind]):
        if kind != "JPEG":
            yield "x.npy", rng.integers(0, 256, SIZES[kind], np.uint8)
            continue
        from PIL import Image

        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((160, 160), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield "jpg", file.getvalue()


def build(folder: Path, kind: str) -> Shards:
    """The set as tars, about 8 of them."""
    rows = (
        ("train", f"{i:08d}", {suffix: content, "cls": i % 10})
        for i, (suffix, content) in enumerate(samples(kind))
    )
    records = 4096 if kind == "packed" else 0
    write_shards(folder, "bench", rows, shard_size=-(-COUNTS[kind] // 8), records=records)
    return Shards(folder, "train")


def contenders(kind: str, shards: Shards, scratch: Path) -> dict[str, Contender]:
    """By name; the first is the limit."""
    field = "image" if kind == "JPEG" else "x"
    paths = [shards.folder / shard.file for shard in shards.shards]
    order = Order(len(shards), 0)

    def ours(order: Order) -> Contender:
        def read() -> int:
            got = 0
            for start in range(0, len(shards), BATCH):
                ids = order.at(start, min(start + BATCH, len(shards)))[1]
                got += len(shards.columns((field, "label"), ids)[field])
            return got

        return read

    found = {_limit_name(kind): _limit(kind, shards, order)}
    if kind == "JPEG":
        found["bare decoder, into batches"] = _bare_batches(shards)
    found |= {
        "ours, shuffled": ours(order),
        "ours, in order": ours(Order(len(shards), 0, shuffle="none")),
    }
    if kind != "packed":
        found["webdataset"] = _webdataset(kind, paths)
        found["tarfile"] = _tarfile(kind, paths)
    try:
        found["litdata"] = _litdata(kind, scratch / "litdata")
    except ImportError as error:
        print(f"litdata is not installed ({error}): make peers")
    return found


def _limit_name(kind: str) -> str:
    return "bare decoder" if kind == "JPEG" else "raw read"


def _limit(kind: str, shards: Shards, order: Order) -> Contender:
    paths = [shards.folder / shard.file for shard in shards.shards]
    if kind == "JPEG":
        import simplejpeg

        pictures = [bytes(view) for view in shards.views("image", np.arange(len(shards)))]
        return lambda: sum(len(simplejpeg.decode_jpeg(one)) > 0 for one in pictures)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    if kind == "packed":

        def whole() -> int:
            for file in files:
                os.lseek(file, 0, os.SEEK_SET)
                while os.read(file, 1 << 20):
                    pass
            return len(shards)

        return whole
    tables = [np.load(path.with_suffix(".index.npy")).reshape(-1, 4).tolist() for path in paths]
    places = [(file, *row) for file, table in zip(files, tables, strict=True) for row in table]
    todo = [places[i] for i in order.at(0, len(shards))[1].tolist()]

    def raw() -> int:
        got = 0
        for file, label_at, label_size, array_at, array_size in todo:
            os.pread(file, label_size, label_at)
            os.pread(file, array_size, array_at)
            got += 1
        return got

    return raw


def _bare_batches(shards: Shards) -> Contender:
    """What it costs that the pixels do not stay in the cache of the processor, as those of a picture alone do."""
    import simplejpeg

    pictures = [bytes(view) for view in shards.views("image", np.arange(len(shards)))]
    shape = simplejpeg.decode_jpeg(pictures[0]).shape

    def read() -> int:
        for start in range(0, len(pictures), BATCH):
            some = pictures[start : start + BATCH]
            for one, out in zip(some, np.empty((len(some), *shape), np.uint8), strict=True):
                simplejpeg.decode_jpeg(one, buffer=out)
        return len(pictures)

    return read


def _webdataset(kind: str, paths: list[Path]) -> Contender:
    def read() -> int:
        import webdataset as wds

        data = wds.WebDataset([str(path) for path in paths], shardshuffle=False)
        return sum(1 for _ in (data.decode("rgb8") if kind == "JPEG" else data))

    return read


def _tarfile(kind: str, paths: list[Path]) -> Contender:
    def read() -> int:
        from PIL import Image

        members = 0
        for path in paths:
            with tarfile.open(path) as archive:
                for member in archive:
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".jpg"):
                        np.asarray(Image.open(io.BytesIO(content)))
                    members += 1
        return members // 2

    return read


def _litdata(kind: str, folder: Path) -> Contender:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, (_, content) in enumerate(samples(kind)):
        writer[i] = {"x": bytes(content), "label": i % 10}
    writer.done()
    writer.merge()
    data = StreamingDataset(str(folder), shuffle=False)

    def read() -> int:
        if kind != "JPEG":
            return sum(1 for _ in data)
        import simplejpeg

        return sum(len(simplejpeg.decode_jpeg(sample["x"])) > 0 for sample in data)

    return read


def measure(kind: str, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median samples a second of each, and its share of the limit and of webdataset in the same rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        shards = build(Path(scratch) / "set", kind)
        run = contenders(kind, shards, Path(scratch))
        speeds: dict[str, list[float]] = {name: [] for name in run}
        for number in range(rounds + 1):
            for name, read in run.items():
                start, got = time.perf_counter(), 0
                while got == 0 or (number and time.perf_counter() - start < seconds / len(run)):
                    got += read()
                if number > 0:  # the first round warms the page cache
                    speeds[name].append(got / (time.perf_counter() - start))
    limit = speeds[_limit_name(kind)]
    return {
        name: {
            "samples_per_second": statistics.median(values),
            "of_the_limit": _ratio(values, limit),
            **{
                f"over_{peer}": _ratio(values, speeds[peer])
                for peer in ("webdataset", "litdata")
                if peer in speeds
            },
        }
        for name, values in speeds.items()
    } | {
        "shuffled over in order": {
            "ratio": _ratio(speeds["ours, shuffled"], speeds["ours, in order"])
        }
    }


def _ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, at least")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {kind: measure(kind, options.rounds, options.seconds) for kind in options.kinds}
    if options.json:
        print(json.dumps(results))
        return
    for kind, rows in results.items():
        print(f"\n{kind}: {COUNTS[kind]:,} samples, median of {options.rounds} interleaved rounds")
        for name, row in rows.items():
            if "ratio" in row:
                print(f"{name:26} {row['ratio']:.2f}")
                continue
            others = "".join(
                f"   {row[key]:7.2f} x {key.removeprefix('over_')}" for key in row if "over_" in key
            )
            speed, share = row["samples_per_second"], row["of_the_limit"]
            print(f"{name:26} {speed:12,.0f}/s   {share:6.2f} of the limit{others}")


if __name__ == "__main__":
    main()
