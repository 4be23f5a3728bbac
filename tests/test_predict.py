"""A trained run in use: on new inputs, on other data, on several evaluation sets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

from dist_train import run, trained
from dist_train.components import build
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError
from dist_train.launch.cli import main
from dist_train.run_directory import RunDirectory
from dist_train.testing import tiny_run
from dist_train.trained.ensemble import ensemble
from dist_train.trained.export import export
from dist_train.trained.predict import predict
from dist_train.world import pin_threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of 8x8 images whose scales differ: `trained-on`, and `other`, twice as bright."""
    from sklearn.datasets import load_digits

    pin_threads(1, 1)
    place = tmp_path_factory.mktemp("use")
    digits = load_digits()

    def rows(factor: int, first: int) -> Any:
        for i in range(first, first + 300):
            image = (digits.images[i] * factor).astype("uint8")
            label = int(digits.target[i])
            yield "test" if i % 3 == 0 else "train", f"{i:05d}", {"image.npy": image, "cls": label}

    names = [f"digit-{i}" for i in range(10)]
    write_shards(place / "trained-on", "digits", rows(7, 0), classes=names)
    write_shards(place / "other", "digits", rows(15, 300), classes=names)
    write_shards(place / "turned", "digits", rows(15, 300), classes=names[::-1])
    return place


@pytest.fixture(scope="module")
def a_run(folder: Path) -> Path:
    recipe = cases.tiny_recipe("resnet", folder)
    recipe = recipe.set("data.path", str(folder / "trained-on")).set("strategy", "single")
    recipe = recipe.set(
        "evaluate",
        {
            "split": "test",
            "every": "5 steps",
            "metrics": ["accuracy", "loss"],
            "best": "other/accuracy",
            "mode": "max",
            "sets": {
                "again": {"split": "test"},
                "other": {"path": str(folder / "other"), "split": "train"},
            },
        },
    )
    return tiny_run(recipe, folder / "run", steps=10)


def network_of(a_run: Path, out: Path) -> Any:
    """The trained network, by way of an export."""
    if not out.exists():
        export(a_run, out, weights="live")
    config = json.loads((out / "config.json").read_text())
    from safetensors.torch import load_file

    network = build("model", config["model"], "model").eval()
    network.load_state_dict(load_file(out / "model.safetensors"))
    return network


def standardised(folder: Path, images: np.ndarray) -> torch.Tensor:
    """As the training data were: by their statistics."""
    statistics = json.loads((folder / "trained-on" / "index.json").read_text())["statistics"][
        "image"
    ]
    x = torch.from_numpy(images.astype(np.float32))[:, None] / 255
    return (x - statistics["mean"][0]) / statistics["std"][0]


def test_several_sets_in_one_run(a_run: Path) -> None:
    rows = [row for row in RunDirectory(a_run).rows() if "evaluate/loss" in row]
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        assert row["evaluate/again/loss"] == row["evaluate/loss"]
        assert row["evaluate/other/loss"] != row["evaluate/loss"]
    best = max(rows, key=lambda row: row["evaluate/other/accuracy"])
    summary = trained.evaluate(a_run)["results"]
    assert set(summary) == {
        f"{s}{m}" for s in ("", "again/", "other/") for m in ("accuracy", "loss")
    }
    assert summary["other/loss"] == pytest.approx(rows[-1]["evaluate/other/loss"])
    assert best["step"] in (5, 10)


def test_other_data_are_brought_to_the_scale_of_the_training_data(
    a_run: Path, folder: Path, tmp_path: Path
) -> None:
    """`evaluate --data` by hand: the exported network on images standardised by the training data's statistics."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [i for i in range(300, 600) if i % 3 == 0]
    images = np.stack([(digits.images[i] * 15).astype("uint8") for i in chosen])
    logits = network_of(a_run, tmp_path / "out")(standardised(folder, images))
    labels = torch.tensor([int(digits.target[i]) for i in chosen])
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    found = trained.evaluate(a_run, data=str(folder / "other"))["results"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(found) == {"accuracy", "loss"}
    with pytest.raises(UserError, match=r"has the classes .*, but the network was trained on"):
        trained.evaluate(a_run, data=str(folder / "turned"))


def test_a_folder_for_what_is_written_is_made_or_refused(
    a_run: Path, folder: Path, tmp_path: Path
) -> None:
    """Before the network is asked, not after."""
    predict(a_run, folder / "other", tmp_path / "new" / "out.csv")
    assert (tmp_path / "new" / "out.csv").is_file()
    runs = [a_run, a_run]
    ensemble(runs, out=tmp_path / "newer" / "out.csv")
    assert (tmp_path / "newer" / "out.csv").is_file()
    (tmp_path / "file").touch()
    for write in (
        lambda out: predict(a_run, folder / "other", out),
        lambda out: ensemble(runs, out=out),
        lambda out: trained.generate(a_run, out),
        lambda out: export(a_run, out),
    ):
        with pytest.raises(UserError, match=r"file(/out.csv)?: (File exists|Not a directory)"):
            write(tmp_path / "file" / "out.csv")


def test_prediction_on_pictures(a_run: Path, folder: Path, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = {f"{i:03d}": (digits.images[i] * 7).astype("uint8") for i in range(700, 717)}
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n, (name, image) in enumerate(images.items()):
        place = tmp_path / "pictures" / ("deep" if n % 2 else "")
        Image.fromarray(image).save(place / f"{name}.png")
    result = predict(a_run, tmp_path / "pictures", tmp_path / "out.csv")
    assert (result["inputs"], result["step"]) == (17, 10)
    table = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    x = standardised(folder, np.stack(list(images.values())))
    probability = network_of(a_run, tmp_path / "export")(x).softmax(dim=1)
    by_name = {row["key"].rpartition("/")[2]: row for row in table}
    assert set(by_name) == set(images)
    for name, expected in zip(images, probability, strict=True):
        row = by_name[name]
        assert row["class"] == f"digit-{int(expected.argmax())}"
        for k in range(10):
            assert float(row[f"probability.digit-{k}"]) == pytest.approx(
                float(expected[k]), abs=1e-5
            )
    one = predict(a_run, tmp_path / "pictures" / "700.png", tmp_path / "one.csv")
    assert one["inputs"] == 1
    Image.fromarray(images["700"]).convert("RGB").save(tmp_path / "coloured.png")
    words = r"coloured.png: has 'image' of shape \[8, 8, 3\], .*: it was trained on \[8, 8\]"
    with pytest.raises(UserError, match=words):
        predict(a_run, tmp_path / "coloured.png", tmp_path / "two.csv")
    coloured = [("test", "a", {"image.npy": np.zeros((8, 8, 3), "uint8"), "cls": 0})]
    names = [f"digit-{i}" for i in range(10)]
    write_shards(tmp_path / "coloured", "coloured", coloured, classes=names)
    with pytest.raises(UserError, match="coloured: has 'image' of shape"):
        trained.evaluate(a_run, data=str(tmp_path / "coloured"))


def test_prediction_on_shards_and_by_the_command(
    a_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert main(["predict", str(a_run), str(folder / "other"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == 300
    assert main(["predict", str(a_run), str(folder / "other"), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_prediction_of_a_regression(tmp_path: Path) -> None:
    """On a table: in the target's own units, with the deviation that was predicted."""
    columns = [f"x{i}" for i in range(3)]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    y = 50 + 10 * x[:, 0] + rng.normal(size=90)
    lines = [
        [f"k{i}", *row, value, -value] for i, (row, value) in enumerate(zip(x, y, strict=True))
    ]
    with open(tmp_path / "table.csv", "w") as file:
        csv.writer(file).writerows([["key", *columns, "y", "z"], *lines])
    recipe: dict[str, Any] = {
        "duration": "150 steps",
        "strategy": "single",
        "threads": 1,
        "data": {"path": "shards", "global_batch": 30, "micro_batch": 30},
        "model": {"name": "mlp", "in_features": 3, "num_outputs": 4, "depth": 1, "width": 16},
        "objective": {"name": "regression", "variance": "predicted"},
        "optimizer": {"name": "adam", "learning_rate": 0.03},
        "callbacks": {"checkpoint": {"every": "150 steps"}},
    }
    pytest.importorskip("pyarrow")
    from dist_train.data_shards.sources import pack
    from dist_train.recipe import Recipe

    options = {"fields": "features.npy=" + "+".join(columns) + ",target.npy=y+z", "key": "key"}
    pack(tmp_path / "table.csv", tmp_path / "shards", **options)
    made = Recipe(**recipe).set("data.path", str(tmp_path / "shards"))
    run.train(made, run_dir=tmp_path / "run")
    predict(tmp_path / "run", tmp_path / "table.csv", tmp_path / "out.csv", options=options)
    found = {r["key"]: r for r in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())}
    assert len(found) == 90
    errors = [float(found[f"k{i}"]["prediction.0"]) - y[i] for i in range(90)]
    assert np.std(errors) < 4  # the targets' own deviation is 10
    assert all(float(row["deviation.1"]) > 0 for row in found.values())


def test_what_predicts_nothing_says_so(tiny_data: Path, tmp_path: Path) -> None:
    first = tiny_run(cases.tiny_recipe("wgan_gp", tiny_data), tmp_path / "gan", steps=3)
    with pytest.raises(UserError, match="WassersteinGradientPenalty predicts nothing"):
        predict(first, tiny_data / "digits", tmp_path / "out.csv")
    with pytest.raises(UserError, match=r"expected a file that ends in \.csv"):
        predict(first, tiny_data / "digits", tmp_path / "out.json")
