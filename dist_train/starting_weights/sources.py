"""Where tensors come from: a checkpoint of ours, or safetensors."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import checkpoint
from dist_train.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.recipe.sections import Weights


class Source(ABC):
    """Named tensors on disk."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""

    @abstractmethod
    def described(self, whole: bool) -> dict[str, Any]:
        """What the run directory remembers of it; digests only when `whole` (they take time)."""


def open_source(path: Path, weights: Weights, networks: Sequence[str], where: str) -> Source:
    """What `find` found, for a player of these networks."""
    if (path / "manifest.json").is_file():
        return RunSource(path, weights.averages, networks, where)
    if weights.averages is not None:
        raise UserError(f"{where}.averages: got '{weights.averages}', but {path} is no run")
    return FileSource(path, networks, where)


class RunSource(Source):
    """A checkpoint of ours: the live weights, or the average that a callback kept."""

    def __init__(
        self, path: Path, averages: str | None, networks: Sequence[str], where: str
    ) -> None:
        self.path, self.averages = path, averages
        self.reader = checkpoint.Reader(path)
        names = {
            name.partition("/")[2]: name
            for name in self.reader.tensors
            if name.startswith(("weights/", "buffers/"))
        }
        if averages is not None:
            of_callbacks = self.reader.names("callbacks/")
            prefix = f"callbacks/{averages}/"
            averaged = {n.removeprefix(prefix): n for n in of_callbacks if n.startswith(prefix)}
            if not averaged:
                instances = sorted({name.split("/")[1] for name in of_callbacks})
                raise UserError(
                    f"{where}.averages: got '{averages}', but {path} holds the averages of"
                    f" {', '.join(instances) or 'no callback'}{nearest(averages, instances)}"
                )
            names |= averaged
        held = {name.partition(".")[0] for name in names}
        chosen = held if len(held) == 1 and len(networks) == 1 else held & set(networks)
        if not chosen:
            raise UserError(
                f"{where}: {path} holds the networks {', '.join(sorted(held))},"
                f" but the player has {', '.join(networks)}"
            )
        strip = len(networks) == 1
        self._names = {
            name.partition(".")[2] if strip else name: full
            for name, full in names.items()
            if name.partition(".")[0] in chosen
        }
        self.shapes = {n: tuple(self.reader.tensors[f]["shape"]) for n, f in self._names.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.reader.read(self._names[name], start, stop)

    def described(self, whole: bool) -> dict[str, Any]:
        manifest = json.loads((self.path / "manifest.json").read_bytes())
        found = {"path": str(self.path), "step": self.reader.step, "sha256": manifest["sha256"]}
        return found | ({"averages": self.averages} if self.averages else {})


class FileSource(Source):
    """Safetensors: one file, a folder in the layout of the Hugging Face hub, or such a folder for each network."""

    def __init__(self, path: Path, networks: Sequence[str], where: str) -> None:
        from safetensors import safe_open

        self.path = path
        self._place: dict[str, tuple[str, Any]] = {}  # the name in its file, and that file
        self.files: list[Path] = []
        by_network = len(networks) > 1 and all((path / name).is_dir() for name in networks)
        folders = {f"{name}.": path / name for name in networks} if by_network else {"": path}
        self.shapes = {}
        for prefix, folder in folders.items():
            for file in _tensor_files(folder, where):
                self.files.append(file)
                try:
                    opened = safe_open(file, framework="pt")
                except Exception as error:
                    raise UserError(f"{where}: {file}: is no safetensors file ({error})") from error
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    self._place[prefix + name] = (name, opened)
                    self.shapes[prefix + name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        inner, file = self._place[name]
        shape = self.shapes[name]
        if len(shape) < 2:
            return file.get_tensor(inner).view(-1)[start:stop]
        row = math.prod(
            shape[1:]
        )  # elements of one index of the first axis, the least that can be read
        first, last = start // max(1, row), math.ceil(stop / max(1, row))
        flat = file.get_slice(inner)[first:last].reshape(-1)
        return flat[start - first * row : stop - first * row]

    def described(self, whole: bool) -> dict[str, Any]:
        digests = {}
        for file in self.files if whole else []:
            with open(file, "rb") as opened:
                digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"path": str(self.path), "sha256": digests}


def _tensor_files(path: Path, where: str) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise UserError(f"{where}: {index} names '{name}', which is not beside it")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"{where}: {path} has no model.safetensors and no model.safetensors.index.json;"
            f" name the file itself ({', '.join(file.name for file in found) or 'there is none'})"
        )
    return found
