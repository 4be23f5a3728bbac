"""Transforms: each against a closed form or another program's; the same draws wherever they run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.data import RunData, evaluation_batches
from dist_train.data_shards import tokens
from dist_train.data_shards import transforms as t
from dist_train.data_shards.assembler import Assembler
from dist_train.data_shards.loader import TrainingBatches, training_batches
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.world import World

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
GREY = IMAGE[..., 0]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def applied(transform, image: np.ndarray = IMAGE, seed: int = 0) -> np.ndarray:
    given = image.copy()
    out = transform({"image": given, "label": 3}, rng(seed))
    assert out["label"] == 3 and out["image"].dtype == np.uint8
    assert np.array_equal(given, image)  # what was given is not changed
    return out["image"]


def test_crops_and_pads() -> None:
    assert np.array_equal(applied(t.CenterCrop(8)), IMAGE[2:10, 4:12])
    padded = applied(t.Pad(2, fill=7), GREY)
    assert np.array_equal(padded[2:-2, 2:-2], GREY) and (padded[:2] == 7).all()
    assert padded.shape == (16, 20)
    assert np.array_equal(applied(t.HorizontalFlip(1.0)), IMAGE[:, ::-1])
    for transform in (t.CenterCrop(13), t.RandomCrop(13)):
        with pytest.raises(UserError, match="12 x 16"):
            applied(transform)


def test_resize_is_that_of_pillow() -> None:
    pillow = pytest.importorskip("PIL.Image")
    for image in (IMAGE, GREY):
        for size in ((6, 8), (24, 32), (5, 16), (12, 31)):
            theirs = pillow.fromarray(image).resize(size[::-1], pillow.Resampling.BILINEAR)
            ours = applied(t.Resize(list(size)), image)
            assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert applied(t.Resize(6)).shape == (6, 8, 3) and applied(t.Resize(12)) is not None
    assert applied(t.Resize(24), GREY).shape == (24, 32)


def test_random_resized_crop() -> None:
    whole = t.RandomResizedCrop(12, area=(1, 1), aspect=(4 / 3, 4 / 3))
    assert np.array_equal(applied(whole), applied(t.Resize([12, 12])))
    shapes = {applied(t.RandomResizedCrop(5), seed=seed).shape for seed in range(50)}
    assert shapes == {(5, 5, 3)}
    flat = np.full((12, 16), 9, np.uint8)
    assert (applied(t.RandomResizedCrop(30), flat) == 9).all()
    with pytest.raises(UserError, match="area \\[0, 1\\]"):
        t.RandomResizedCrop(5, area=(0, 1))


def test_cutout_is_one_square() -> None:
    ones = np.ones((12, 16, 3), np.uint8)
    holes = [applied(t.Cutout(4), ones, seed) == 0 for seed in range(200)]
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any((1, 2))), np.flatnonzero(hole.any((0, 2)))
        assert 2 <= len(rows) <= 4 and 2 <= len(columns) <= 4
        assert hole.sum() == len(rows) * len(columns) * 3
    assert np.any(holes, axis=0).all()  # every pixel is in one
    never = t.Cutout(4, probability=0)
    assert np.array_equal(applied(never), IMAGE)


def test_colour_jitter_follows_its_formulas() -> None:
    assert np.array_equal(applied(t.ColourJitter()), IMAGE)
    factor = rng(5).uniform(0.5, 1.5)
    bright = applied(t.ColourJitter(brightness=0.5), seed=5)
    assert np.abs(bright - np.clip(IMAGE * factor, 0, 255)).max() <= 0.5 + 1e-3
    draws = rng(5)
    draws.uniform(1, 1)
    factor = draws.uniform(0, 2)
    mean = (IMAGE @ np.array([0.299, 0.587, 0.114])).mean()
    contrast = applied(t.ColourJitter(contrast=1.0), seed=5)
    assert np.abs(contrast - np.clip(mean + (IMAGE - mean) * factor, 0, 255)).max() <= 0.5 + 1e-3
    grey = np.repeat(GREY[..., None], 3, 2)
    assert np.array_equal(applied(t.ColourJitter(saturation=1.0), grey), grey)
    assert applied(t.ColourJitter(0.4, 0.4, 0.4), GREY).shape == GREY.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.RandomCrop(0),
        lambda: t.Pad(0),
        lambda: t.Pad(1, fill=256),
        lambda: t.Resize([1, 2, 3]),
        lambda: t.Resize(0),
        lambda: t.Cutout(0),
        lambda: t.Cutout(1, probability=2),
        lambda: t.ColourJitter(brightness=2),
        lambda: t.Tokenise(0),
        lambda: t.Tokenise(4, tokenizer="/nowhere/tokenizer.json"),
    ],
)
def test_wrong_arguments(make) -> None:
    with pytest.raises(UserError):
        make()


def test_text_becomes_tokens(tmp_path: Path) -> None:
    texts = ["", "a", "some words", "longer words than that"]
    write_shards(
        tmp_path / "x", "x", [("train", str(i), {"txt": text}) for i, text in enumerate(texts)]
    )
    tokenizer = tokens.train("character", [b"abcdefghijklmnopqrstuvwxyz "])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    shards = Shards(tmp_path / "x", "train")
    for path, reader in ((None, tokens.ByteTokenizer()), (tmp_path / "tokenizer.json", tokenizer)):
        tokenise = t.Tokenise(8, tokenizer=None if path is None else str(path))
        made = Assembler(shards, 0, [tokenise]).tensors(np.arange(4), np.zeros(4, np.int64))
        assert made["length"].tolist() == [1, 1, 8, 8] and made["tokens"].shape == (4, 9)
        assert made["tokens"][0, :2].tolist() == [reader.boundary] * 2
        for row, text in zip(made["tokens"][2:], texts[2:], strict=True):
            assert reader.decode(row.tolist()).decode() in text


def test_a_users_own_function_and_augmentation_are_the_same_everywhere(
    tmp_path: Path, monkeypatch
) -> None:
    """From a recipe; in this process and in workers; from step 0 and from step 3."""
    from dist_train.data import RunData
    from dist_train.recipe import Recipe
    from dist_train.world import World

    images = np.random.default_rng(1).integers(0, 256, (20, 9, 9, 3), dtype=np.uint8)
    rows = [("train", str(i), {"image.npy": image, "cls": i % 2}) for i, image in enumerate(images)]
    write_shards(tmp_path / "x", "x", rows)
    (tmp_path / "own_transforms.py").write_text(
        "def shifted(sample, rng, at=0):\n"
        "    return {**sample, 'label': sample['label'] + at + int(rng.integers(100)) * 10}\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "project: x\nduration: 6 steps\nmodel: {name: resnet, depth: 8, num_classes: auto}\n"
        "objective: {name: classification}\noptimizer: {name: sgd, learning_rate: 0.1}\n"
        "data:\n  path: x\n  global_batch: 8\n  micro_batch: 4\n  transforms:\n    train:\n"
        "    - {name: random_resized_crop, size: 6}\n    - {name: colour_jitter, brightness: 0.4}\n"
        "    - {name: cutout, size: 2}\n    - {name: 'own_transforms:shifted', at: 2}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe.load(str(tmp_path / "recipe.yaml"))

    def batches(workers: int, first: int) -> list[tuple[list, list]]:
        data = RunData(recipe.set("data.workers", workers), World())
        return [
            (micro["label"].tolist(), micro["image"].tolist())
            for _, micros in data.batches.from_(first, 6)
            for micro in micros
        ]

    whole = batches(0, 0)
    assert batches(2, 3) == batches(0, 3) == whole[6:]
    labels = [label for row, _ in whole for label in row]
    assert {label % 10 for label in labels} == {2, 3} and len(set(labels)) > 20
    with pytest.raises(
        UserError, match=r"transforms.train.0.*no argument 'att', did you mean 'at'"
    ):
        recipe.set(
            "data.transforms.train", [{"name": "own_transforms:shifted", "att": 2}]
        ).check_components()


CHAIN = [
    t.Pad(1, fill=9),
    t.RandomCrop(9, padding=2),
    t.HorizontalFlip(),
    t.Cutout(4, fill=7, probability=0.7),
    t.CenterCrop(6),
    t.RandomCrop(5),
]


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)])
@pytest.mark.parametrize("scale", ["standard", "signed", "unit"])
def test_batches_on_the_device_equal_samples_on_the_cpu(tmp_path: Path, shape, scale) -> None:
    """Bit for bit, the same draws, on any ranks and workers."""
    rng = np.random.default_rng(0)
    rows = [
        ("train", str(i), {"image.npy": rng.integers(0, 256, shape, np.uint8), "cls": i % 3})
        for i in range(20)
    ]
    write_shards(tmp_path / "x", "x", rows)
    shards = Shards(tmp_path / "x", "train")

    def batches(**options) -> TrainingBatches:
        return training_batches(
            shards, seed=3, global_batch=8, micro_batch=4, transforms=CHAIN, scale=scale, **options
        )

    for step, ours in batches(device="cpu").from_(0, 6):
        for one, other in zip(ours, batches().batch(step), strict=True):
            assert one.tensors.keys() == other.tensors.keys() == {"image", "label"}
            assert one["image"].shape == (4, shape[2] if shape[2:] else 1, 5, 5)
            assert torch.equal(one["image"], other["image"]), step
            assert one["image"].is_contiguous() and torch.equal(one["label"], other["label"])
    (alone,) = batches(device="cpu", rank=1, world_size=2, workers=1).from_(5, 6)
    assert torch.equal(alone[1][0]["image"], ours[1]["image"])
    with pytest.raises(
        UserError, match=r"on the device: ColourJitter runs on a sample.*RandomCrop"
    ):
        training_batches(
            shards,
            seed=0,
            global_batch=4,
            micro_batch=4,
            transforms=[t.ColourJitter()],
            device="cpu",
        )


def test_a_recipe_says_where_transforms_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (split, str(i), {"image.npy": rng.integers(0, 256, (8, 8), np.uint8), "cls": i % 3})
        for i in range(12)
        for split in ("train", "test")
    ]
    write_shards(tmp_path / "x", "x", rows)
    crop, flip = {"name": "random_crop", "size": 8, "padding": 2}, {"name": "horizontal_flip"}
    settings = {
        "data": {
            "global_batch": 4,
            "micro_batch": 4,
            "a": {"path": "x", "transforms": {"train": [crop, flip], "evaluate": [crop]}},
            "b": {"path": "x", "transforms": {"train": [flip]}},
        },
        "duration": "1 steps",
        "model": {"name": "lenet", "num_classes": "auto"},
        "objective": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "evaluate": {"split": "test", "every": "1 epoch", "metrics": ["loss"]},
    }
    here = Recipe.restore(settings, "test", tmp_path)
    there = here.set("data.a.transforms.on", "device")
    for read in (
        lambda recipe: RunData(recipe, World()).batches.batch(2),
        lambda recipe: list(evaluation_batches(recipe, World(), "test")),
    ):
        for one, other in zip(read(there), read(here), strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one[name], other[name]) for name in one.tensors)
