"""What a trained network makes of new inputs: pictures, tables, arrays, shards, prepared as its training data were."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train import randomness
from dist_train.data import data_folders, evaluation_batches
from dist_train.data_shards import tokens
from dist_train.data_shards.index import Index
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import pack
from dist_train.data_shards.sources.pictures import PICTURE_FILES
from dist_train.data_shards.sources.source import key_of
from dist_train.data_shards.write import Row, write_shards
from dist_train.errors import UserError, writing
from dist_train.run_directory import write_file
from dist_train.trained import restore, shapes_told
from dist_train.trainer import Trainer

SPLIT = "predict"


def predict(
    run_dir: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a CSV file with a line for each input: its key, and what the objective predicts for it.

    Args:
        source: a picture, a folder of pictures, a folder of shards, or what `shards pack` takes (tables, arrays).
        out: the file; must not exist. weights: "live", or the callback whose average to take (default: the recipe's).
        options: of the source, as `shards pack` takes them: `{"fields": ...}`.
    Raises: UserError when the objective predicts nothing, or the inputs are not what the network takes.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; name a new file")
    if out.suffix != ".csv":
        raise UserError(f"{out}: expected a file that ends in .csv")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    trainer = restore(run_dir)
    section = trainer.recipe.evaluate
    chosen = weights or (section.weights if section else "live")
    with tempfile.TemporaryDirectory() as scratch:
        folder = _shards(Path(source), Path(scratch) / "inputs", options or {})
        with shapes_told(trainer.recipe, folder, source):
            rows = [
                row
                for split in Index.load(folder).splits
                for row in _predicted(trainer, folder, split, chosen)
            ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with writing(out):
        write_file(out, text.getvalue().encode())
    return {"out": str(out), "step": trainer.step, "weights": chosen, "inputs": len(rows)}


def _predicted(
    trainer: Trainer, folder: Path, split: str, weights: str
) -> Iterator[dict[str, Any]]:
    import torch

    shards = Shards(folder, split)
    beside = data_folders(trainer.recipe)[0]
    classes, tokenizer = Index.load(beside).classes, tokens.load(beside)
    networks = trainer.view(weights)
    for micro in evaluation_batches(trainer.recipe, trainer.world, split, folder):
        randomness.reseed(trainer.seed, trainer.step, randomness.EVALUATION, micro.index)
        with torch.no_grad():
            found = trainer.objective.predict(networks, micro.to(trainer.world.device))
        columns = {name: tensor.tolist() for name, tensor in found.items()}
        for row in range(micro.real):
            line: dict[str, Any] = {"key": shards.key(int(micro.ids[row]))}
            for name, values in columns.items():
                if name == "text":
                    line[name] = tokenizer.decode(values[row]).decode(errors="replace")
                    continue
                line |= cells(name, values[row], classes)
            yield line


def cells(name: str, value: Any, classes: list[str]) -> dict[str, Any]:
    """One column, or one for each of several numbers: by the name of the class where there are as many."""
    if name == "class":
        return {name: classes[value] if classes else value}
    if not isinstance(value, list):
        return {name: value}
    if len(value) == 1:
        return {name: value[0]}
    names = classes if len(classes) == len(value) else range(len(value))
    return {f"{name}.{which}": one for which, one in zip(names, value, strict=True)}


def _shards(source: Path, scratch: Path, options: Mapping[str, Any]) -> Path:
    """The inputs as shards: what is none yet is packed into `scratch`."""
    if source.is_dir() and any(source.glob("*.tar")):
        return source
    files = [source] if source.is_file() else sorted(source.rglob("*"))
    pictures = [file for file in files if file.suffix.lower() in PICTURE_FILES]
    if not pictures:
        pack(source, scratch, **options)
        return scratch

    def rows() -> Iterator[Row]:
        suffix = PICTURE_FILES[pictures[0].suffix.lower()]
        for file in pictures:
            inner = Path(file.name) if source.is_file() else file.relative_to(source)
            yield SPLIT, key_of(inner), {suffix: file}

    write_shards(scratch, "inputs", rows())
    return scratch
