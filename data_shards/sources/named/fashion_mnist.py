"""Fashion-MNIST: 70,000 pictures of clothes in 10 classes, in place of digits (Xiao, Rasul and Vollgraf 2017)."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np

from dist_train.data_shards.sources.cache import cached, first_of
from dist_train.data_shards.sources.debian import unpack_package
from dist_train.data_shards.sources.hugging_face import load_split
from dist_train.data_shards.sources.idx import read_idx, write_idx
from dist_train.data_shards.sources.source import Source, labelled
from dist_train.errors import UserError

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("usr/share/datasets/fashion-mnist")
CLASSES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot"
DIGESTS = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""Of the files without gzip, so that they are the same wherever they come from."""


def fashion_mnist() -> Source:
    """60,000 + 10,000 pictures of clothes, 28 x 28 greys, 10 classes; a tenth of the 60,000 is for validation."""
    folder = cached("fashion-mnist", DIGESTS, _fetch)
    parts = []
    for part, fractions in (("train", {"train": 0.9, "validation": 0.1}), ("t10k", {"test": 1.0})):
        images = read_idx(folder / f"{part}-images-idx3-ubyte")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte")
        parts.append(labelled(images, labels, fractions, prefix=f"{part}-"))
    return Source(
        "fashion-mnist",
        (row for part in parts for row in part),
        "Fashion-MNIST by Zalando SE (Xiao, Rasul and Vollgraf 2017)",
        "MIT",
        [name.replace("_", " ") for name in CLASSES.split()],
        total=70_000,
    )


def _fetch(folder: Path) -> None:
    first_of(
        "fashion-mnist",
        {
            f"/{INSTALLED}": lambda: _gunzip(Path("/") / INSTALLED, folder),
            f"Debian package {PACKAGE}": lambda: _unpack(folder),
            "Hugging Face": lambda: _download(folder),
        },
    )


def _unpack(folder: Path) -> None:
    root = unpack_package(PACKAGE, folder / "package")
    _gunzip(root / INSTALLED, folder)
    shutil.rmtree(folder / "package")


def _gunzip(installed: Path, folder: Path) -> None:
    for file in DIGESTS:
        path = installed / f"{file}.gz"
        if not path.is_file():
            raise UserError(f"{path} is not there")
        with gzip.open(path) as source, (folder / file).open("wb") as target:
            shutil.copyfileobj(source, target)


def _download(folder: Path) -> None:
    for split, part in (("train", "train"), ("test", "t10k")):
        data = load_split("zalandoresearch/fashion_mnist", split)
        images = np.stack([np.asarray(image, np.uint8) for image in data["image"]])
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.array(data["label"]))
