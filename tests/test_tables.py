"""Tables, arrays, tars and Hugging Face data sets: what they hold arrives in the shards, under the right fields."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards.index import Index
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import pack
from dist_train.data_shards.sources.idx import write_idx
from dist_train.data_shards.sources.splits import Sharing
from dist_train.data_shards.write import split_of, write_shards
from dist_train.errors import UserError


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


def samples(folder: Path, split: str = "train") -> dict[str, dict]:
    shards = Shards(folder, split)
    return {shards.key(i): shards.sample(i) for i in range(len(shards))}


ROWS = [
    {"name": f"n{i}", "age": i, "bmi": i / 2, "digit": "odd" if i % 2 else "even"} for i in range(9)
]


def write_table(path: Path) -> None:
    arrow, csv, parquet = (
        pytest.importorskip(name) for name in ("pyarrow", "pyarrow.csv", "pyarrow.parquet")
    )
    table = arrow.Table.from_pylist(ROWS)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"people.{kind}"
    write_table(path)
    index = pack(
        path,
        tmp_path / "out",
        fields="features=age+bmi,cls=digit,name.txt=name",
        key="name",
        split="all",
    )
    assert index.classes == ["even", "odd"]
    found = samples(tmp_path / "out", "all")
    for i, row in enumerate(ROWS):
        sample = found[row["name"]]
        assert sample["features"].tolist() == [i, i / 2] and sample["features"].dtype == np.float32
        assert (sample["label"], sample["name"]) == (i % 2, row["name"])
    pack(path, tmp_path / "all")
    found = {}
    for split in Index.load(tmp_path / "all").splits:
        found |= samples(tmp_path / "all", split)
        assert all(split_of(key) == split for key in samples(tmp_path / "all", split))
    assert [found[f"{i:09d}"]["digit"] for i in range(9)] == [row["digit"] for row in ROWS]
    for options, pattern in [
        ({"fields": "cls=digt"}, "no column 'digt', did you mean 'digit'"),
        ({"fields": "cls=name,cls=age"}, "comes twice"),
        ({"key": "nam"}, "key 'nam'"),
        ({"fields": "x.npy=name"}, "row '000000000': column 'name' cannot be 'x.npy'"),
        (
            {"fields": "cls=bmi"},
            "row '000000001': column 'bmi' cannot be 'cls': 0.5 is not a whole number",
        ),
        ({"key": "digit"}, "key 'even'.*appears twice"),
        ({"split": "a=b"}, "split 'a=b'"),
        ({"block": 3}, "no option 'block'"),
    ]:
        with error(pattern):
            pack(path, tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()


def test_files_and_columns_tell_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train-00000-of-00001.csv").write_text("label,text\n1,one\n0,zero\n")
    (folder / "test.csv").write_text("label,text\n2,two\n")
    index = pack(folder, tmp_path / "out")
    assert {split: index.samples(split) for split in index.splits} == {"train": 2, "test": 1}
    assert [(s["label"], s["text"]) for s in samples(tmp_path / "out").values()] == [
        (1, "one"),
        (0, "zero"),
    ]
    (tmp_path / "one.tsv").write_text("split\tlabel\nheld_out\t1\ntrain\t0\n")
    index = pack(tmp_path / "one.tsv", tmp_path / "out2")
    assert set(index.splits) == {"held_out", "train"} and list(index.fields) == ["cls"]
    (folder / "test.csv").write_text("label,words\n2,two\n")
    with error("test.csv: has the columns|have \\["):
        pack(folder, tmp_path / "out3")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with error("bad.parquet: not a table"):
        pack(tmp_path / "bad.parquet", tmp_path / "out4")


def test_sharing() -> None:
    assert Sharing("test")("a") == "test"
    some = Sharing("train=9, held_out=1")
    assert sum(some(str(i)) == "train" for i in range(10_000)) == pytest.approx(9_000, abs=150)


def test_idx_and_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 256, (n, 5, 5), dtype=np.uint8)
        for part, n in (("train", 7), ("test", 3))
    }
    labels = {part: np.arange(len(array)) % 3 for part, array in images.items()}
    (tmp_path / "idx").mkdir()
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        write_idx(tmp_path / "idx" / f"{prefix}-images-idx3-ubyte", images[part])
        write_idx(tmp_path / "idx" / f"{prefix}-labels-idx1-ubyte", labels[part])
        arrays |= {
            f"x_{part}": images[part],
            f"y_{part}": labels[part],
            f"z_{part}": labels[part] / 2,
        }
    np.savez(tmp_path / "set.npz", **arrays)
    for number, source in enumerate(("idx", "set.npz")):
        out = tmp_path / str(number)
        assert pack(tmp_path / source, out).describe()["num_classes"] == 3
        for part in ("train", "test"):
            shards = Shards(out, part)
            ids = np.arange(len(shards))
            assert np.array_equal(shards.column("image", ids), images[part])
            assert shards.column("label", ids).tolist() == labels[part].tolist()
    assert Shards(tmp_path / "1", "test").sample(2)["z"] == 1.0
    with error("arrays of different lengths"):
        np.savez(tmp_path / "odd.npz", x=images["train"], y=labels["test"])
        pack(tmp_path / "odd.npz", tmp_path / "2")
    with error("not arrays that can be read"):
        np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
        pack(tmp_path / "objects.npz", tmp_path / "3")


def test_a_web_dataset_is_packed_again(tmp_path: Path) -> None:
    rows = [
        ("train" if i % 3 else "extra", str(i), {"cls": i % 2, "txt": f"{i}"}) for i in range(30)
    ]
    write_shards(tmp_path / "a", "a", rows, classes=["no", "yes"], licence="MIT", shard_size=4)
    index = pack(tmp_path / "a", tmp_path / "b", shard_size=100)
    assert (index.classes, index.licence, len(list(index.shards()))) == (["no", "yes"], "MIT", 2)
    for split in ("train", "extra"):
        assert samples(tmp_path / "a", split) == samples(tmp_path / "b", split)
    pack(tmp_path / "a", tmp_path / "c", fields="cls,words.txt=txt")
    assert samples(tmp_path / "c")["1"] == {"label": 1, "words": "1"}


def test_splits_of_any_name_beside_train(tmp_path: Path) -> None:
    """Folders, files and arrays; without a `train` beside them names tell nothing."""
    for name, text in (("train", "0"), ("val-00000-of-00001", "1"), ("held_out-00000", "2")):
        (tmp_path / f"{name}.csv").write_text(f"label\n{text}\n")
        folder = tmp_path / "texts" / name.partition("-")[0]
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("a text")
    wanted = {"train": 1, "validation": 1, "held_out": 1}
    index = pack(tmp_path, tmp_path / "tables" / "out")
    assert {split: index.samples(split) for split in index.splits} == wanted
    index = pack(tmp_path / "texts", tmp_path / "out")
    assert {split: index.samples(split) for split in index.splits} == wanted
    arrays = {f"{what}_{split}": np.arange(4) for what in "xy" for split in ("train", "held_out")}
    np.savez(tmp_path / "a.npz", **arrays)
    index = pack(tmp_path / "a.npz", tmp_path / "out-arrays")
    assert {split: index.samples(split) for split in index.splits} == {"train": 4, "held_out": 4}
    assert set(index.fields) == {"x.npy", "cls"}
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "held_out.csv").write_text("label\n0\n")
    assert list(pack(tmp_path / "some", tmp_path / "out-some").splits) == [split_of("000000000")]


def test_hugging_face_data_sets(tmp_path: Path, monkeypatch) -> None:
    """Saved in a folder: pictures as they are stored, class names, splits."""
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [image.fromarray(array) for array in pixels], "label": [0, 1, 1, 0]}
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "saved")
    index = pack(tmp_path / "saved", tmp_path / "out")
    assert index.classes == ["cat", "dog"] and list(index.fields) == ["cls", "png"]
    read = list(samples(tmp_path / "out").values())
    assert [sample["label"] for sample in read] == [0, 1, 1, 0]
    assert np.array_equal(np.stack([sample["image"] for sample in read]), pixels)
    assert next(iter(samples(tmp_path / "out", "test").values()))["label"] == 1
    with error("'nobody/nothing' cannot be loaded"):
        pack("hf://nobody/nothing", tmp_path / "x")


def test_hugging_face_data_sets_come_from_the_offline_cache(tmp_path: Path, monkeypatch) -> None:
    """One that was downloaded before: here the library's own cache of a Parquet file, under the name of a set."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    label = datasets.ClassLabel(names=["vowel", "consonant"])
    features = datasets.Features({"letter": datasets.Value("string"), "label": label})
    rows = {"letter": list("abcde"), "label": [0, 1, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "file.parquet")
    datasets.load_dataset("parquet", data_files=str(tmp_path / "file.parquet"))
    (info,) = (tmp_path / "cache" / "parquet").glob("*/0.0.0/*/dataset_info.json")
    target = tmp_path / "cache" / "somebody___letters" / "default" / "0.0.0" / info.parent.name
    target.parent.mkdir(parents=True)
    info.parent.rename(target)
    (target / "parquet-train.arrow").rename(target / "letters-train.arrow")
    index = pack("hf://somebody/letters", tmp_path / "out")
    assert index.classes == ["vowel", "consonant"]
    read = list(samples(tmp_path / "out").values())
    assert [one["letter"] for one in read] == list("abcde")
    assert [one["label"] for one in read] == [0, 1, 1, 1, 0]
