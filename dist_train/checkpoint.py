"""Checkpoints hold named tensors, not ranks: any world size, any ZeRO stage, any engine loads them (law 6).

    step-00000500/
        rank-00000.safetensors ...   each rank's own slices, keyed `name@first-element`
        index.json                   step, values, and where each tensor's slices lie
        manifest.json                bytes and SHA-256 of every other file

A checkpoint is written beside its place, digested, and published by one rename; it is verified before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import CheckpointError
from dist_train.faults import faultpoint

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.engine import Slice
    from dist_train.world import World

FORMAT = 1
PREFIX = "step-"


def save(
    folder: Path,
    step: int,
    slices: Iterable[tuple[str, Slice]],
    values: Mapping[str, Any],
    world: World,
) -> Path:
    """Write a checkpoint of this step (collective). Each rank passes the slices that it alone is to write.

    Args:
        folder: the run's `checkpoints/`.
        slices: (full name, slice) pairs; together the ranks cover every tensor once.
        values: JSON values, the same on every rank.
    Returns: the published folder.
    """
    from safetensors.torch import save_file

    final = folder / f"{PREFIX}{step:08d}"
    scratch = folder / f".writing-{step:08d}"
    if world.is_main:
        for kind in ("writing", "replaced", "deleting"):  # what a killed save or deletion left
            for stale in folder.glob(f".{kind}-*"):
                shutil.rmtree(stale)
        scratch.mkdir(parents=True)
    world.barrier()
    faultpoint("save")
    name = f"rank-{world.rank:05d}.safetensors"
    tensors, index = {}, []
    for full_name, part in slices:
        tensors[f"{full_name}@{part.start}"] = part.tensor.detach().contiguous().cpu()
        index.append([full_name, list(part.shape), part.start, part.stop])
    save_file(tensors, scratch / name)
    _sync(scratch / name)
    mine = {"file": name, "index": index, "bytes": (scratch / name).stat().st_size}
    reports = world.gather(mine | {"sha256": sha256(scratch / name)})
    faultpoint("save-written")
    if world.is_main:
        tensor_index: dict[str, Any] = {}
        for report in reports:
            for full_name, shape, start, stop in report["index"]:
                entry = tensor_index.setdefault(full_name, {"shape": shape, "parts": []})
                entry["parts"].append([report["file"], start, stop])
        _write_json(
            scratch / "index.json",
            {"format": FORMAT, "step": step, "values": dict(values), "tensors": tensor_index},
        )
        files = {r["file"]: {"bytes": r["bytes"], "sha256": r["sha256"]} for r in reports}
        files["index.json"] = {
            "bytes": (scratch / "index.json").stat().st_size,
            "sha256": sha256(scratch / "index.json"),
        }
        body = {"format": FORMAT, "step": step, "files": files}
        _write_json(scratch / "manifest.json", body | {"sha256": _digest_of(body)})
        _sync(scratch)
        faultpoint("save-publish")
        aside = folder / f".replaced-{step:08d}"
        if final.exists():  # damaged, or of this step before its callbacks were through
            final.rename(aside)
            faultpoint("save-aside")
        scratch.rename(final)
        _sync(folder)
        if aside.exists():
            shutil.rmtree(aside)
    world.barrier()
    faultpoint("saved")
    return final


def put_back(folder: Path) -> None:
    """Undo what a save did that was killed after it had put the checkpoint of its step aside, and before it had put
    its own there."""
    for aside in folder.glob(".replaced-*"):
        final = folder / (PREFIX + aside.name.removeprefix(".replaced-"))
        if not final.exists():
            aside.rename(final)


def steps(folder: Path) -> list[int]:
    """The steps of all published checkpoints, ascending."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        digits = path.name.removeprefix(PREFIX)
        if path.is_dir() and digits.isdigit():
            found.append(int(digits))
    return sorted(found)


def at(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint: every file is measured and digested. Empty when it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != _digest_of(body):
            return ["manifest.json: its own digest does not match"]
        if manifest["format"] > FORMAT:
            return [
                f"manifest.json: format {manifest['format']}, this version reads up to {FORMAT}"
            ]
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json: unreadable ({type(error).__name__})"]
    found = []
    present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    found += [f"{name}: not in the manifest" for name in sorted(present - set(files))]
    for name, expected in files.items():
        if name not in present:
            found.append(f"{name}: missing")
        elif (path / name).stat().st_size != expected["bytes"]:
            found.append(
                f"{name}: {(path / name).stat().st_size} bytes, expected {expected['bytes']}"
            )
        elif sha256(path / name) != expected["sha256"]:
            found.append(f"{name}: SHA-256 differs")
    return found


def last_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with those passed over.

    Raises CheckpointError when there are checkpoints but none is whole: a run never silently starts over.
    """
    skipped: list[str] = []
    all_steps = steps(folder)
    for step in reversed(all_steps):
        wrong = problems(at(folder, step))
        if not wrong:
            return at(folder, step), skipped
        skipped += [f"{at(folder, step).name}/{line}" for line in wrong]
    if all_steps:
        raise CheckpointError(
            f"{folder}: none of {len(all_steps)} checkpoints is whole: {'; '.join(skipped)}"
        )
    return None, skipped


class Reader:
    """Reads ranges of named tensors from a checkpoint that `problems` found whole. CheckpointError for one without a
    readable index."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            index = json.loads((self.path / "index.json").read_bytes())
            self.step: int = index["step"]
            self.values: dict[str, Any] = index["values"]
            self.tensors: dict[str, Any] = index["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged: index.json: unreadable ({type(error).__name__})"
            ) from error
        self._open: dict[str, Any] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `name`."""
        import torch

        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: holds no tensor '{name}'")
        pieces = []
        for file, first, end in sorted(self.tensors[name]["parts"], key=lambda part: part[1]):
            low, high = max(start, first), min(stop, end)
            if low < high or start == stop:
                part = self._file(file).get_slice(f"{name}@{first}")
                pieces.append((low, part[low - first : high - first]))
        covered = sum(len(piece) for _, piece in pieces)
        if covered != stop - start:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' lacks {stop - start - covered} elements"
            )
        return torch.cat([piece for _, piece in pieces]) if len(pieces) > 1 else pieces[0][1]

    def whole(self, name: str) -> Tensor:
        """The tensor `name` in its own shape."""
        import math

        shape = self.tensors[name]["shape"]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def fill(self, name: str, part: Slice) -> None:
        """Overwrite a slice's storage from the tensor `name`, whose shape must be the slice's."""
        if name in self.tensors and self.tensors[name]["shape"] != list(part.shape):
            raise CheckpointError(
                f"{self.path}: '{name}' has shape {self.tensors[name]['shape']}, the model's is {list(part.shape)}"
            )
        part.tensor.copy_(self.read(name, part.start, part.stop))

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def open_whole(path: Path) -> Reader:
    """A reader of this very checkpoint; CheckpointError when anything in it is damaged."""
    wrong = problems(path)
    if wrong:
        raise CheckpointError(f"{path}: damaged: {'; '.join(wrong)}")
    return Reader(path)


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself or from a run directory (its last good one)."""
    path = Path(path)
    if (path / "manifest.json").exists():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, _ = last_good(folder)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here (expected {folder}/{PREFIX}NNNNNNNN)")
    return found


def inspect(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: step, tensors with shapes and parts, values."""
    reader = Reader(resolve(path))
    return {
        "path": str(reader.path),
        "step": reader.step,
        "bytes": sum(file.stat().st_size for file in reader.path.iterdir()),
        "tensors": {
            name: {"shape": entry["shape"], "parts": len(entry["parts"])}
            for name, entry in reader.tensors.items()
        },
        "values": reader.values,
    }


def check(path: Path) -> dict[str, Any]:
    """Digest every checkpoint of a run directory (or one checkpoint) and list what is wrong with each."""
    path = Path(path)
    if path.name.startswith(PREFIX):
        folders = [path]
    else:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        folders = [at(folder, step) for step in steps(folder)]
    if not folders:
        raise CheckpointError(f"{path}: no checkpoint here")
    return {folder.name: problems(folder) for folder in folders}


def diff(first: Path, second: Path) -> dict[str, Any]:
    """The largest difference of each tensor that two checkpoints share, and what only one of them has."""
    a, b = open_whole(resolve(first)), open_whole(resolve(second))
    shared = [name for name in a.tensors if name in b.tensors]
    differences = {}
    for name in shared:
        x, y = a.whole(name), b.whole(name)
        same_shape = x.shape == y.shape
        differences[name] = float((x.double() - y.double()).abs().max()) if same_shape else None
    return {
        "first": str(a.path),
        "second": str(b.path),
        "identical": set(a.tensors) == set(b.tensors)
        and weights_digest(a.path) == weights_digest(b.path),
        "differences": differences,
        "only_first": sorted(set(a.tensors) - set(b.tensors)),
        "only_second": sorted(set(b.tensors) - set(a.tensors)),
    }


def weights_digest(path: Path) -> str:
    """SHA-256 over every tensor's name and bytes, whole, in order of name: the same however it was sharded."""
    import torch

    reader = Reader(resolve(path))
    digest = hashlib.sha256()
    for name in sorted(reader.tensors):
        digest.update(name.encode())
        digest.update(reader.whole(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, sort_keys=True))
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
