"""Mixtures, several named streams and bootstraps as recipes have them: exact on any ranks, from any step."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.data import RunData, evaluation_batches
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import check
from dist_train.data_shards.mixture import Together
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.testing import tiny_run
from dist_train.world import World


def write(folder: Path, count: int, first: int, size: int = 4, **options) -> None:
    rows = (
        (split, f"{i:03d}", {"image.npy": np.full((size, size), first + i, np.uint8), "cls": i % 3})
        for split in ("train", "test")
        for i in range(count)
    )
    write_shards(folder, folder.name, rows, shard_size=7, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sets whose pictures tell which sample they are: 20 of 0.., 30 of 100.., both of 3 classes."""
    root = tmp_path_factory.mktemp("streams")
    write(root / "small", 20, 0)
    write(root / "large", 30, 100)
    write(root / "wide", 5, 200, size=6)
    write(root / "named", 5, 200, classes=["x", "y", "z"])
    return root


def recipe(root: Path, **data) -> Recipe:
    settings = {
        "data": {"global_batch": 12, "micro_batch": 2} | data,
        "duration": "10 steps",
        "model": {"name": "lenet", "num_classes": "auto"},
        "objective": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "evaluate": {"split": "test", "every": "1 epoch", "metrics": ["loss"]},
    }
    return Recipe.restore(settings, "test", root)


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank=rank, size=size, local_rank=0, local_size=1, device="cpu")


def steps(recipe: Recipe, ranks: int = 1, start: int = 0) -> list[list]:
    """The micro-batches of steps [start, 10), of all ranks put together."""
    parts = [dict(RunData(recipe, world(r, ranks)).batches.from_(start, 10)) for r in range(ranks)]
    return [[micro for part in parts for micro in part[step]] for step in range(start, 10)]


def test_a_recipe_leaves_out_what_is_damaged(tmp_path: Path, caplog) -> None:
    """A page instead of a shard, a truncated one, one whose labels are wrong: counted, and the same on any ranks."""
    write(tmp_path / "set", 40, 0)
    tars = sorted((tmp_path / "set").glob("set-train-*.tar"))
    good = Shards(tmp_path / "set", "train")
    assert len(tars) > 3
    tars[0].write_bytes(b"<html>please log in</html>" * 99)
    content = tars[1].read_bytes()
    tars[1].write_bytes(content[: len(content) // 2])
    _, places = good._places(np.array([good.sizes[:2].sum() + 1]))
    label = int(places[0, 0, 0])
    content = tars[2].read_bytes()
    tars[2].write_bytes(content[:label] + b"x" + content[label + 1 :])
    with pytest.raises(UserError, match=r"set-train-000000.tar.*when it was indexed.*shards index"):
        steps(recipe(tmp_path, path="set"))
    skip = recipe(tmp_path, path="set", on_damage="skip")
    with caplog.at_level("WARNING", logger="dist_train"):
        one = steps(skip)
    index = Index.read(tmp_path / "set")
    assert sum(lost.samples for lost in index.left_out) == len(good) - index.samples("train") > 1
    assert {lost.file for lost in index.left_out} == {path.name for path in tars[:3]}
    assert [line for line in caplog.messages if "1 samples of set-train-000002.tar" in line]
    for ranks, start in ((2, 3), (3, 0)):
        for ours, theirs in zip(steps(skip, ranks, start), one[start:], strict=True):
            assert [micro.ids.tolist() for micro in ours] == [
                micro.ids.tolist() for micro in theirs
            ]
            assert all(
                torch.equal(a["image"], b["image"]) for a, b in zip(ours, theirs, strict=True)
            )
    assert Index.read(tmp_path / "set") == index
    with pytest.raises(UserError, match="on_damage: got skip, expected stop for an address"):
        recipe(tmp_path, path="s3://bucket/set", on_damage="skip")


def test_one_process_of_many_makes_the_index(tmp_path: Path, processes) -> None:
    write(tmp_path / "set", 40, 0)
    path = min((tmp_path / "set").glob("set-train-*.tar"))
    path.write_bytes(path.read_bytes()[:2048])
    told = processes.Queue()
    looking = [
        processes.Process(target=_first_look, args=(tmp_path / "set", told)) for _ in range(4)
    ]
    for process in looking:
        process.start()
    prints = {told.get(timeout=240) for _ in looking}
    for process in looking:
        process.join(120)
    assert len(prints) == 1 and check(tmp_path / "set") == []


def _first_look(folder: Path, told: Any) -> None:
    index = Index.load(folder, on_damage="skip")
    Shards(folder, "train", index).columns(("image",), np.arange(index.samples("train")))
    told.put(index.fingerprint)


FORMS = {
    "mixture": {"sources": [{"path": "small", "weight": 0.25}, {"path": "large", "weight": 0.75}]},
    "named": {"a": {"path": "small"}, "b": {"path": "large", "shuffle": "window", "window": 2}},
    "bootstrap": {"path": "large", "resample": "bootstrap"},
    "streams": {"path": "large", "streams": 12, "shuffle": "window"},
}


@pytest.mark.parametrize("form", FORMS)
def test_any_ranks_workers_and_step(root: Path, form: str) -> None:
    unbroken = steps(recipe(root, **FORMS[form]))
    for ranks, start, workers in ((1, 4, 2), (2, 0, 0), (3, 7, 0), (6, 9, 0)):
        got = steps(recipe(root, workers=workers, **FORMS[form]), ranks, start)
        for ours, theirs in zip(got, unbroken[start:], strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                assert np.array_equal(mine.ids, other.ids) and mine.index == other.index
                assert mine.tensors.keys() == other.tensors.keys()
                assert all(torch.equal(mine[name], other[name]) for name in mine.tensors)


def shown(micros: list, field: str) -> np.ndarray:
    """Which samples are in the pictures of those micro-batches."""
    return np.concatenate([(micro[field][:, 0, 0, 0] * 255).round().int() for micro in micros])


def test_a_mixture(root: Path) -> None:
    data = recipe(root, scale="unit", **FORMS["mixture"])
    run = RunData(data, world())
    assert run.samples == 50 and run.known["num_classes"] == 3
    for micros in steps(data):
        pictures = shown(micros, "image")
        assert (pictures < 100).sum() == 3 and (pictures >= 100).sum() == 9
    pictures = np.concatenate([shown(micros, "image") for micros in steps(data)])
    small = pictures[pictures < 100]
    assert np.array_equal(np.sort(small[:20]), np.arange(20))
    evaluation = list(evaluation_batches(data, world(), "test"))
    seen = np.concatenate([shown([micro], "image")[: micro.real] for micro in evaluation])
    assert np.array_equal(np.sort(seen), [*range(20), *range(100, 130)])


def test_statistics_of_a_mixture_are_those_of_its_draws(root: Path) -> None:
    parts = [Shards(root / name, "train") for name in ("small", "large")]
    pixels = [np.arange(20) / 255, np.arange(100, 130) / 255]
    both = Together(parts, [3, 1]).index.statistics["image"]
    draws = np.concatenate([np.repeat(pixels[0], 9), np.repeat(pixels[1], 2)])  # 180 : 60
    assert both["mean"][0] == pytest.approx(draws.mean(), abs=1e-6)
    assert both["std"][0] == pytest.approx(draws.std(), abs=1e-6)


def test_named_streams_have_orders_of_their_own(root: Path) -> None:
    data = recipe(root, a={"path": "small", "scale": "unit"}, b={"path": "large", "scale": "unit"})
    run = RunData(data, world())
    assert run.samples == 30 and list(run.batches.streams) == ["a", "b"]
    micros = [micro for step in steps(data) for micro in step]
    assert micros[0].ids.shape == (2, 2)
    assert set(micros[0].tensors) == {"a.image", "a.label", "b.image", "b.label"}
    a, b = shown(micros, "a.image"), shown(micros, "b.image")
    assert np.array_equal(np.sort(a[:20]), np.arange(20))
    assert np.array_equal(np.sort(b[:30]), np.arange(100, 130))
    twice = recipe(root, a={"path": "small"}, b={"path": "small"})
    ids = np.concatenate([micro.ids for step in steps(twice) for micro in step])
    assert not np.array_equal(ids[:, 0], ids[:, 1])
    with pytest.raises(UserError, match=r"unequal numbers of samples \(a 20, b 30\)"):
        evaluation_batches(data, world(), "test")
    assert len(evaluation_batches(twice, world(), "test")) == 10
    assert data.set("data.b.path", "small").as_dict()["data"]["b"]["path"] == "small"


def test_a_slow_source_is_shown_and_said(root: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """X34: the share of time that the steps waited is in every row, and a warning tells what to raise."""
    (tmp_path / "slow.py").write_text(
        "now = 0.0\n\nclass Slow:\n    def __call__(self, sample, rng):\n"
        "        global now\n        now += 20.0\n        return sample\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    slow = importlib.import_module("slow")
    clock = SimpleNamespace(perf_counter=lambda: slow.now)  # nothing else takes time
    monkeypatch.setattr("dist_train.heartbeat.time", clock)
    monkeypatch.setattr("dist_train.callbacks.journal.time", clock)
    settings = recipe(
        root, path=str(root / "large"), transforms={"train": [{"name": "slow:Slow"}]}
    ).as_dict()
    settings |= {
        "log": {"every": "2 steps"},
        "model": {"name": "mlp", "in_features": 16, "num_outputs": 3},
    }
    del settings["evaluate"]
    plan = Recipe.restore(settings, "test", tmp_path)
    with caplog.at_level("WARNING", "dist_train"):
        run = tiny_run(plan, tmp_path / "run", steps=4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["data_wait"] for row in rows] == [1.0] * 4
    said = [record.message for record in caplog.records if "waiting for data" in record.message]
    assert len(said) == 1 and "raise data.workers (now 0)" in said[0]


def test_a_bootstrap_by_seed(root: Path) -> None:
    def drawn(resample) -> np.ndarray:
        return RunData(recipe(root, path="large", resample=resample), world()).batches.ids(0)

    assert np.array_equal(drawn("bootstrap"), drawn({"name": "bootstrap", "seed": 0}))
    assert not np.array_equal(drawn("bootstrap"), drawn({"name": "bootstrap", "seed": 1}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pth": "small"}, r"data.pth: unknown key, did you mean 'path'"),
        ({"transform": {"train": []}}, r"data.transform: unknown key, did you mean 'transforms'"),
        ({"a": {"path": "small", "shufle": "none"}}, r"data.a.shufle: unknown key.*'shuffle'"),
        ({"a": {"path": "x", "name": "digits"}}, r"data.a.name: got 'digits' with path 'x'"),
        ({"a": {"path": "x"}, "scale": "unit"}, r"data.scale: given beside the streams a"),
        ({"a": {"path": "x"}, "path": "y"}, r"data.path: given beside the streams a"),
        ({"path": "x", "sources": [{"path": "y"}]}, r"sources: given together with name, path"),
        ({"sources": []}, r"data.sources: got \[\], expected a list of sources"),
        ({"sources": [{"path": "x", "weight": 0}]}, r"data.sources.0.weight: got 0, expected"),
        ({"sources": [{"weight": 1}]}, r"data.sources.0.*name: got None with path None"),
        ({"sources": [{"path": "x"}], "streams": 2}, r"streams: got 2, expected 1 with several"),
        ({"path": "x", "streams": 5}, r"streams: got 5, expected auto or a divisor .* 12: 1, 2"),
        ({"path": "x", "shuffle": "globel"}, r"data.shuffle: got 'globel', expected global"),
        ({"path": "x", "resample": "boot"}, r"data.resample.name: got 'boot', expected bootstrap"),
        ({"path": "x", "resample": "bootstrap", "shuffle": "window"}, r"resample: got bootstrap"),
        ({"path": "x", "window": 0}, r"data.window: got 0, expected a whole number"),
    ],
)
def test_bad_data_sections(root: Path, data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        recipe(root, **data)
    assert "\n" not in str(raised.value)


def test_sources_that_do_not_go_together(root: Path) -> None:
    parts = [Shards(root / name, "train") for name in ("small", "named")]
    with pytest.raises(UserError, match=r"has the classes \['x', 'y', 'z'\], .*must have the same"):
        Together(parts)
    both = Together([Shards(root / name, "train") for name in ("small", "wide")])
    assert next(f for f in both.index.fields.values() if f.name == "image").shape == [None, None]
    with pytest.raises(UserError, match="has shape"):
        RunData(recipe(root, sources=[{"path": "small"}, {"path": "wide"}]), world()).batches.batch(
            0
        )
