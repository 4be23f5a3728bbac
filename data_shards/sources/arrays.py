"""Arrays in files: IDX, the format of MNIST, and numpy's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards.indexing import SPLITS
from dist_train.data_shards.sources.columns import LABELS, wanted
from dist_train.data_shards.sources.idx import read_idx
from dist_train.data_shards.sources.source import Source, name_of
from dist_train.data_shards.sources.splits import DEFAULT, Sharing, splits_in_names
from dist_train.data_shards.write import Row
from dist_train.errors import UserError

IDX = re.compile(r"(?:(.+?)[-_])?(images|labels)[-_.]idx\d[-_]ubyte(\.gz)?")
ALIASES = {"x": "image", "images": "image", "y": "label", "labels": "label", "targets": "label"}


def idx_files(path: str | Path, split: str = DEFAULT) -> Source:
    """IDX files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-...`, plain or gzipped."""
    root = Path(path)
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(root.iterdir()):
        match = IDX.fullmatch(file.name)
        if match:
            part = (match[1] or "").replace("t10k", "test")
            found.setdefault(part, {})[match[2]] = read_idx(file)
    parts = {}
    for part, arrays in found.items():
        if set(arrays) != {"images", "labels"}:
            raise UserError(
                f"{root}: '{part}' has {', '.join(arrays)}, and needs images and labels"
            )
        parts[part] = {"image.npy": arrays["images"], "cls": arrays["labels"]}
    if not parts:
        raise UserError(f"{root}: no IDX files (train-images-idx3-ubyte, ...) in it")
    return _source(root, parts, split)


def numpy_files(path: str | Path, fields: str | None = None, split: str = DEFAULT) -> Source:
    """Arrays of an `.npz`, or `.npy` files of a folder, whose rows are samples: `x_train`, `y_train`, `x_test`, ...

    A name may end in its split; beside `x_train` that is any word after `x_`. `x` and `images` are the field `image` if
    they are bytes of 2 or 3 axes; `y`, `labels` and `targets`, whole numbers, are `cls`; all others keep their names.
    """
    root = Path(path)
    parts: dict[str, dict[str, np.ndarray]] = {}
    arrays = dict(_arrays(root))
    for name, (stem, part) in _split_ends(list(arrays)).items():
        parts.setdefault(part, {})[stem] = arrays[name]
    for part, arrays in parts.items():
        chosen = wanted(fields, list(arrays))
        renamed = {}
        for suffix, names in chosen.items():
            if len(names) != 1:
                raise UserError(f"fields '{fields}': arrays cannot be joined")
            array = arrays[names[0]]
            plain = suffix.startswith("=")
            renamed[_suffix(names[0], array) if plain else suffix] = array
        parts[part] = renamed
    return _source(root, parts, split)


def _split_ends(names: list[str]) -> dict[str, tuple[str, str]]:
    """{name: (what the array is, its split or "")}."""
    found = {name: (name, "") for name in names}
    stems = {
        stem
        for stem, _, last in (name.rpartition("_") for name in names)
        if stem and last in SPLITS
    }
    for name in names:
        for stem in stems:
            if name.startswith(f"{stem}_"):
                found[name] = stem, name.removeprefix(f"{stem}_")
    return found


def _arrays(root: Path) -> list[tuple[str, np.ndarray]]:
    try:
        if root.is_file():
            loaded: Any = np.load(root, allow_pickle=False)
            return [(name, loaded[name]) for name in loaded.files]
        files = sorted(root.glob("*.npy"))
        return [(file.stem, np.load(file, mmap_mode="r", allow_pickle=False)) for file in files]
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"{root}: not arrays that can be read: {error}") from error


def _suffix(name: str, array: np.ndarray) -> str:
    alias = ALIASES.get(name, name)
    if alias in LABELS and array.ndim == 1 and array.dtype.kind in "ui":
        return "cls"
    if alias == "image" and not (array.dtype == np.uint8 and array.ndim in (3, 4)):
        alias = name
    return f"{alias if alias != 'label' else name}.npy"


def _source(root: Path, parts: dict[str, dict[str, np.ndarray]], split: str) -> Source:
    sharing = Sharing(split)
    for part, arrays in parts.items():
        sizes = {suffix: len(array) if array.ndim else 0 for suffix, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"{root}: '{part}' has arrays of different lengths: {sizes}")

    told = splits_in_names(parts)

    def samples() -> Iterator[Row]:
        for part, arrays in parts.items():
            for i in range(len(next(iter(arrays.values())))):
                key = f"{part}-{i:09d}" if part else f"{i:09d}"
                values = {suffix: array[i] for suffix, array in arrays.items()}
                yield told[part] or sharing(key), key, values

    total = sum(len(next(iter(arrays.values()))) for arrays in parts.values())
    return Source(name_of(root), samples(), str(root), "as given by its owner", total=total)
