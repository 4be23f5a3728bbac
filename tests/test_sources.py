"""Sources: what arrives in the shards is what the source holds."""

import gzip
import hashlib
import re
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards.loader import training_batches
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import NAMED, cache, pack
from dist_train.data_shards.sources.idx import read_idx, write_idx
from dist_train.data_shards.sources.named.austen import read_rdb
from dist_train.data_shards.sources.named.ddtp import pairs
from dist_train.data_shards.transforms import Standardise
from dist_train.errors import UserError


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


# --- fetched and kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_files_are_fetched_once_and_checked(kept: Path) -> None:
    calls = []

    def fetch(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_bytes(b"content")

    digests = {"a": hashlib.sha256(b"content").hexdigest()}
    assert cache.cached("set", digests, fetch) == kept / "set"
    assert cache.cached("set", digests, fetch) == kept / "set"
    assert len(calls) == 1 and [path.name for path in kept.iterdir()] == ["set"]
    (kept / "set" / "a").write_bytes(b"contenT")
    with error(f"set/a: SHA-256 .*expected {digests['a']}"):
        cache.cached("set", digests, fetch)
    with error("other/a: SHA-256|other-.*/a: SHA-256"):
        cache.cached("other", {"a": "0" * 64}, fetch)
    with error("b: missing"):
        cache.cached("third", {"b": "0" * 64}, fetch)
    assert [path.name for path in kept.iterdir()] == ["set"]


def test_several_fetch_at_once(kept: Path) -> None:
    def fetch(folder: Path) -> None:
        (folder / "a").write_bytes(b"content")

    digests = {"a": hashlib.sha256(b"content").hexdigest()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.cached("set", digests, fetch), range(4)))
    assert found == [kept / "set"] * 4 and [path.name for path in kept.iterdir()] == ["set"]


def test_every_way_that_failed_is_named() -> None:
    def fails(reason: str):
        def way() -> None:
            raise UserError(reason)

        return way

    with error("a set cannot be had; here: not there; there: not here"):
        cache.first_of("a set", {"here": fails("not there"), "there": fails("not here")})
    cache.first_of("a set", {"here": fails("not there"), "there": lambda: None})


def test_a_debian_package_is_unpacked_where_it_is_wanted(tmp_path: Path, monkeypatch) -> None:
    """With an `apt-get` that gives a package made here."""
    from dist_train.data_shards.sources.debian import unpack_package

    if subprocess.run(["sh", "-c", "command -v dpkg-deb"], capture_output=True).returncode:
        pytest.skip("no dpkg-deb")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: tiny\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "data").write_text("content")
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "tiny.deb"], check=True, capture_output=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\ncp "{tmp_path}/tiny.deb" "$PWD/$2_1.deb"\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    root = unpack_package("tiny", tmp_path / "out")
    assert (root / "usr" / "data").read_text() == "content"
    (tools / "apt-get").write_text(
        '#!/bin/sh\necho "E: Unable to locate package $2" >&2\nexit 100\n'
    )
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "cache"))
    with error("apt-get .*: E: Unable to locate"):
        unpack_package("tiny", tmp_path / "out2")


def test_digests_taken_when_fetched_hold_from_then_on(kept: Path) -> None:
    def fetch(folder: Path) -> None:
        (folder / "a").write_text("content")

    assert cache.cached("set", None, fetch) == cache.cached("set", None, fetch)
    (kept / "set" / "a").write_text("contenT")
    with error("set/a: SHA-256"):
        cache.cached("set", None, fetch)
    (kept / "set" / "SHA256SUMS").unlink()
    with error("SHA256SUMS: cannot be read"):
        cache.cached("set", None, fetch)


# --- formats of packages ---------------------------------------------------------------------------------------------


def r_strings(strings: list[str]) -> bytes:
    """A vector of strings as R serialises it, and stores it in a lazy-load data base."""
    content = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    content += struct.pack(">ii", 16, len(strings))
    for string in strings:
        content += struct.pack(">ii", 0x40009, len(string.encode())) + string.encode()
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_r_data_bases(tmp_path: Path) -> None:
    vectors = [["CHAPTER I", "", "Emma \u00e9"], ["Chapter 1", "x"]]
    content = b"".join(map(r_strings, vectors))
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(content)
    assert read_rdb(path) == vectors
    for cut in range(1, len(content)):
        path.write_bytes(content[:cut])
        if cut == len(r_strings(vectors[0])):
            assert read_rdb(path) == vectors[:1]
        else:
            with error("Rdata.rdb: the chunk at byte"):
                read_rdb(path)
    for wrong in (b"A\n", b"X\n\0\0\0\2"):
        path.write_bytes(struct.pack(">I", 9) + zlib.compress(wrong + bytes(60)))
        with error("not R's XDR"):
            read_rdb(path)


def test_pairs_of_descriptions(tmp_path: Path) -> None:
    english, french = tmp_path / "Translation-en", tmp_path / "Translation-fr"
    english.write_text(
        "Package: a\nDescription-md5: 1\nDescription-en: tool: a\n One\n line.\n .\n  * list\n .\n Two\n\n"
        "Package: b\nDescription-md5: 2\nDescription-en: tool: a\n Other.\n\n"
        "Package: c\nDescription-md5: 3\nDescription-en: same\n"
    )
    french.write_text(
        "Package: a\nDescription-md5: 1\nDescription-fr: outil: a\n Une\n ligne.\n .\n  * liste\n .\n Deux\n\n"
        "Package: b\nDescription-md5: 2\nDescription-fr: autre\n Un.\n .\n Deux.\n\n"
        "Package: c\nDescription-md5: 3\nDescription-fr: same\n\n"
        "Package: d\nDescription-md5: 4\nDescription-fr: rien\n"
    )
    found = [(row["en.txt"], row["fr.txt"]) for _, _, row in pairs(english, french, "fr")]
    assert found == [("tool: a", "outil: a"), ("One line.", "Une ligne."), ("Two", "Deux")]


# --- IDX -------------------------------------------------------------------------------------------------------------


def test_idx(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    path = tmp_path / "images-idx3-ubyte"
    write_idx(path, images)
    content = path.read_bytes()
    assert content[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5])
    assert np.array_equal(read_idx(path), images)
    zipped = tmp_path / "images.gz"
    zipped.write_bytes(gzip.compress(content))
    assert np.array_equal(read_idx(zipped), images)
    path.write_bytes(bytes([0, 0, 13, 1, 0, 0, 0, 2]) + np.array([1.5, -2], ">f4").tobytes())
    assert read_idx(path).tolist() == [1.5, -2] and read_idx(path).dtype == np.float32
    for cut in (0, 2, 3, 4, 10, 15, 16, 30, len(content) - 1):
        path.write_bytes(content[:cut])
        with error("images-idx3-ubyte: .*(not an IDX|needs 60 bytes)"):
            read_idx(path)


# --- by name ---------------------------------------------------------------------------------------------------------


def test_diabetes_is_standardised_by_the_statistics_of_the_index(tmp_path: Path) -> None:
    """C5: mean 0 and deviation 1 over a pass."""
    datasets = pytest.importorskip("sklearn.datasets")
    index = pack("diabetes", tmp_path / "diabetes")
    features, target = datasets.load_diabetes(return_X_y=True, scaled=False)
    train = Shards(tmp_path / "diabetes", "train")
    ids = [int(train.key(i)) for i in range(len(train))]
    assert np.array_equal(train.column("features", np.arange(len(ids))), np.float32(features[ids]))
    assert np.array_equal(
        train.column("target", np.arange(len(ids)))[:, 0], np.float32(target[ids])
    )
    assert sum(index.samples(split) for split in index.splits) == len(features)
    batches = training_batches(
        train,
        seed=0,
        global_batch=len(train),
        micro_batch=len(train),
        transforms=[Standardise(["features", "target"], index.statistics)],
    )
    for field in ("features", "target"):
        values = batches.batch(0)[0][field].double().numpy()
        assert np.abs(values.mean(0)).max() < 1e-5 and np.abs(values.std(0) - 1).max() < 1e-5
    with error("no statistics of 'feature', did you mean 'features'"):
        Standardise(["feature"], index.statistics)


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    from dist_train.data_shards.write import write_shards

    rng = np.random.default_rng(0)
    arrays = [rng.normal(1e4, 1, (int(n), 3)).astype(np.float32) for n in rng.integers(0, 5, 40)]
    write_shards(
        tmp_path / "x",
        "x",
        [("train", str(i), {"a.npy": a, "s.npy": np.float64(i)}) for i, a in enumerate(arrays)],
    )
    index = Shards(tmp_path / "x", "train").index
    rows = np.concatenate(arrays).astype(np.float64)
    assert index.statistics["a"]["mean"] == pytest.approx(rows.mean(0), rel=1e-8)
    assert index.statistics["a"]["std"] == pytest.approx(rows.std(0), rel=1e-6)
    assert index.statistics["s"] == {"mean": [19.5], "std": [pytest.approx(np.arange(40).std())]}


# --- fetched: what this machine's cache holds ------------------------------------------------------------------------


def needs(name: str):
    """Tests of what must be fetched run where it has been (`dist-train shards pack NAME OUT` fetches it)."""
    return pytest.mark.skipif(
        not (cache.cache_folder() / name).is_dir(), reason=f"{name} is not in the cache"
    )


@needs("fashion-mnist")
def test_fashion_mnist(tmp_path: Path) -> None:
    index = pack("fashion-mnist", tmp_path / "fashion")
    counts = {split: index.samples(split) for split in index.splits}
    assert counts["train"] + counts["validation"] == 60_000 and counts["test"] == 10_000
    assert counts["validation"] == pytest.approx(6_000, rel=0.05)
    test = Shards(tmp_path / "fashion", "test")
    labels = np.array(test.column("label", np.arange(10_000)))
    assert (np.bincount(labels) == 1_000).all() and len(index.classes) == 10


@needs("emoji-google")
@needs("emoji-twitter")
def test_emoji_are_aligned(tmp_path: Path) -> None:
    google, twitter = (
        {
            split: [(key, row["txt"], row["cls"]) for at, key, row in samples if at == split]
            for split in ("train", "validation", "test")
        }
        for samples in (list(NAMED[f"emoji-{style}"]().samples) for style in ("google", "twitter"))
    )
    assert google == twitter
    assert sum(map(len, google.values())) == 3786
    tone = re.compile(r", [a-z -]+ skin tone$")
    bases = [{tone.sub("", name) for _, name, _ in rows} for rows in google.values()]
    assert not bases[0] & bases[1] and not bases[0] & bases[2] and not bases[1] & bases[2]
