"""Samples packed in blocks: the same samples, smaller and faster, and still a WebDataset."""

from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards.decode import decode_npy
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import check, index_shards
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import pack
from dist_train.data_shards.write import split_of, write_shards
from dist_train.errors import UserError


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


def rows(count: int = 50):
    rng = np.random.default_rng(0)
    for i in range(count):
        yield (
            split_of(str(i)),
            f"folder/{i}",
            {
                "image.npy": rng.integers(0, 256, (4, 5), dtype=np.uint8),
                "x.npy": rng.normal(size=(2, 3)).astype(np.float32),
                "y.npy": np.int32(i),
                "cls": i % 3,
                "txt": "\u00e9" * (i % 4),
                "json": {"i": i},
                "tokens.npy": rng.integers(0, 300, int(rng.integers(2, 9))).astype(np.uint16),
            },
        )


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    write_shards(tmp_path / "plain", "set", rows(), shard_size=20)
    write_shards(tmp_path / "packed", "set", rows(), shard_size=20, records=8)
    return tmp_path / "plain", tmp_path / "packed"


def test_packed_samples_are_the_same(both: tuple[Path, Path]) -> None:
    plain, packed = both
    ours, theirs = Index.load(packed), Index.load(plain)
    assert ours.describe() == theirs.describe() and ours.tokens == theirs.tokens
    assert ours.statistics == theirs.statistics
    for split in theirs.splits:
        a, b = Shards(plain, split), Shards(packed, split)
        assert len(a) == len(b)
        for i in range(len(a)):
            one, other = a.sample(i), b.sample(i)
            assert a.key(i) == b.key(i) and one.keys() == other.keys()
            for name, value in one.items():
                assert np.array_equal(value, other[name])
                if isinstance(value, np.ndarray):
                    assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape)
        ids = np.random.default_rng(1).permutation(len(a))
        for name in ("image", "x", "y", "label"):
            assert isinstance(b.column(name, ids), np.ndarray)
            assert np.array_equal(a.column(name, ids), b.column(name, ids))
    size = {folder: sum(path.stat().st_size for path in folder.glob("*.tar")) for folder in both}
    assert size[packed] < size[plain] / 3


def test_packed_shards_are_indexed_again_and_checked(both: tuple[Path, Path]) -> None:
    _, packed = both
    before = Index.load(packed)
    assert check(packed) == [] and index_shards(packed) == before
    (packed / "index.json").unlink()
    assert index_shards(packed, decode_all=True).fields == before.fields
    path = packed / before.split("train")[0].file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with error(f"{path.name}.*truncated"):
        index_shards(packed)
    index = index_shards(packed, on_damage="skip")
    assert 0 < index.samples("train") == before.samples("train") - index.left_out[0].samples
    assert Shards(packed, "train").sample(0)["y"] == Shards(both[0], "train").sample(0)["y"]


def test_packed_shards_are_packed_again(both: tuple[Path, Path], tmp_path: Path) -> None:
    """One by one, and in blocks of another size: the same samples, class names and licence."""
    write_shards(tmp_path / "a", "set", rows(), records=8, classes=["a", "b", "c"], licence="MIT")
    assert index_shards(tmp_path / "a") == Index.load(tmp_path / "a")
    plain, _ = both
    for records in (0, 5):
        again = pack(tmp_path / "a", tmp_path / f"again-{records}", records=records)
        assert (again.classes, again.licence) == (["a", "b", "c"], "MIT")
        for split in again.splits:
            ours, theirs = Shards(tmp_path / f"again-{records}", split), Shards(plain, split)
            for i in range(len(theirs)):
                one, other = ours.sample(i), theirs.sample(i)
                assert ours.key(i) == theirs.key(i) and one.keys() == other.keys()
                assert all(np.array_equal(one[name], other[name]) for name in other)


def test_webdataset_reads_packed(both: tuple[Path, Path]) -> None:
    wds = pytest.importorskip("webdataset")
    _, packed = both
    paths = sorted(str(path) for path in packed.glob("*-train-*.tar"))
    shards, i = Shards(packed, "train"), 0
    for block in wds.WebDataset(paths, shardshuffle=False):
        images = decode_npy(memoryview(block["image.npy"]))
        bounds = decode_npy(memoryview(block["tokens.offsets.npy"]))
        tokens = decode_npy(memoryview(block["tokens.npy"]))
        for k, key in enumerate(block["keys.txt"].decode().splitlines()):
            sample = shards.sample(i)
            assert key == shards.key(i) and np.array_equal(images[k], sample["image"])
            assert np.array_equal(tokens[bounds[k] : bounds[k + 1]], sample["tokens"])
            i += 1
    assert i == len(shards)


def test_arrays_of_a_block_have_one_shape(tmp_path: Path) -> None:
    shapes = [(2, 3), (2, 3), (3, 3)]
    samples = [("train", str(i), {"x.npy": np.zeros(shape)}) for i, shape in enumerate(shapes)]
    with error("sample '2': 'x.npy' is \\(3, 3\\) of float64, others are \\(2, 3\\)"):
        write_shards(tmp_path / "a", "a", samples, records=3)
    with error("arrays of .*others have"):
        write_shards(tmp_path / "b", "b", samples, records=2, shard_size=2)
    with error("records -1"):
        write_shards(tmp_path / "c", "c", samples, records=-1)
    with error("damaged.*\\(3, 3\\)|damaged.*\\[3, 3\\]"):
        write_shards(tmp_path / "d", "d", samples, records=2)
