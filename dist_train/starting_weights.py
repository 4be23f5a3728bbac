"""Starting weights: a run, a safetensors file, a folder or a name of the Hugging Face hub, loaded before step 0.

Every rank reads only the slices that it holds, whatever the strategy. Names are those within the network, where source
and player have one each, else NETWORK.NAME.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import checkpoint
from dist_train.engine.views import plain_name
from dist_train.errors import UserError, nearest
from dist_train.run_directory import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.engine import Engine
    from dist_train.recipe import Recipe
    from dist_train.recipe_sections import Rename, Weights
    from dist_train.run_directory import RunDirectory
    from dist_train.world import World

HUB = "hf://"
SHOWN = 3
"""So many names of each kind of misfit go into a message; all of them into the run's weights.json."""


def find(weights: Weights, root: Path, where: str = "weights") -> Path:
    """Where the weights lie: a checkpoint, a safetensors file, or a folder of such; a hub name is downloaded.

    Raises UserError when there is nothing to load. A run's checkpoint is digested here.
    """
    source = weights.source
    if source.startswith(HUB):
        return _download(source, where)
    path = root / Path(source).expanduser()
    if (path / "manifest.json").is_file():
        return checkpoint.open_whole(path).path
    if (path / "recipe.yaml").is_file():
        return checkpoint.resolve(path)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if path.is_dir() and any(path.rglob("*.safetensors")):
        return path
    pickled = [file.name for file in path.glob("*.bin")] if path.is_dir() else []
    reason = f"only {pickled[0]}, a pickle, which is never read" if pickled else "nothing"
    raise UserError(
        f"{where}.from: got '{source}', expected a run directory, a checkpoint, a .safetensors file, a folder with"
        f" model.safetensors, or hf://ORG/MODEL; there is {reason} at {path}"
    )


def check(recipe: Recipe) -> None:
    """Find every player's weights before a rank is started, and download what is on the hub."""
    for player, weights in recipe.starting_weights.items():
        find(weights, recipe.root, recipe.where_of("weights", player))


def load(
    recipe: Recipe, engines: Mapping[str, Engine], world: World, directory: RunDirectory
) -> None:
    """Give every player the weights that the recipe names, and write what was done to `weights.json` (collective)."""
    report = {}
    for player, weights in recipe.starting_weights.items():
        where = recipe.where_of("weights", player)
        found: dict[str, str] = {}
        if world.is_main:
            try:
                found["path"] = str(find(weights, recipe.root, where))
            except UserError as error:
                found["error"] = str(error)
        found = world.agree(found)
        if "error" in found:
            raise UserError(found["error"])
        path = Path(found["path"])
        if weights.source.startswith(HUB) and not world.is_main:
            path = _download(weights.source, where)  # the cache may be another machine's
        source = open_source(path, weights, list(recipe.networks[player]), where)
        match = load_player(engines[player], source, weights, list(recipe.networks[player]), where)
        report[player] = source.described(world.is_main) | match.described()
        if world.is_main:
            logging.getLogger("dist_train").info(
                "%s of %s: %d tensors from %s%s",
                where,
                player,
                len(match.pairs),
                source.path,
                match,
            )
    if report and world.is_main:
        text = json.dumps(report, indent=2, ensure_ascii=True)
        write_file(directory.path / "weights.json", text.encode())


def load_player(
    engine: Engine, source: Source, weights: Weights, networks: Sequence[str], where: str
) -> Match:
    """Write the source's tensors into one engine's slices, each rank its own; raises UserError for what must fit."""
    prefix = f"{networks[0]}." if len(networks) == 1 else ""
    paths = {
        plain_name(path).removeprefix(prefix): tensor
        for path, tensor in engine.player.named_parameters(remove_duplicate=False)
    }
    one_name = {id(p): name.removeprefix(prefix) for name, p in engine.names.items()}
    aliases = {path: one_name[id(tensor)] for path, tensor in paths.items()}
    kept = {plain_name(name).removeprefix(prefix) for name in engine.player.state_dict()}
    shapes = {n.removeprefix(prefix): tuple(engine.shape(p)) for n, p in engine.names.items()}
    derived = set()  # buffers that no file holds, since the network computes them
    for name, buffer in engine.buffers.items():
        if name.removeprefix(prefix) in kept:
            shapes[name.removeprefix(prefix)] = tuple(buffer.shape)
        else:
            derived.add(name.removeprefix(prefix))
    match = fit(shapes, source.shapes, weights.rename, aliases, derived, where)
    match.judge(weights, source.path, where)
    for full_name, part in engine.slices():
        kind, _, name = full_name.partition("/")
        inner = name.removeprefix(prefix)
        if kind in ("weights", "buffers") and inner in match.pairs:
            part.tensor.copy_(source.read(match.pairs[inner], part.start, part.stop))
    engine.publish()
    return match


# ---------------------------------------------------------------------------------------------------------------------
# Which tensor becomes which


@dataclass
class Match:
    """Pairs of (the network's name, the source's name), and what fits nothing, by the names of the network."""

    pairs: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mismatched: dict[str, list[list[int]]] = field(
        default_factory=dict
    )  # [the network's, the source's]

    def described(self) -> dict[str, Any]:
        return {
            "loaded": len(self.pairs),
            "missing": self.missing,
            "extra": self.extra,
            "mismatched": self.mismatched,
        }

    def __str__(self) -> str:
        """`; missing: 2 (a, b)` and so on; empty when everything fits."""
        shapes = [
            f"{name} {ours} from {theirs}" for name, (ours, theirs) in self.mismatched.items()
        ]
        kinds = {"missing": self.missing, "extra": self.extra, "mismatched": shapes}
        return "".join(f"; {kind}: {_some(names)}" for kind, names in kinds.items() if names)

    def judge(self, weights: Weights, path: Path, where: str) -> None:
        """Raise UserError when something does not fit that `weights` does not allow for."""
        wrong = [
            kind
            for kind in ("missing", "extra", "mismatched")
            if getattr(self, kind) and getattr(weights, kind) == "error"
        ]
        if wrong:
            raise UserError(
                f"{where}: {path} does not fit the network{self}"
                f" (rename them, or allow it: {', '.join(f'{kind}: ignore' for kind in wrong)})"
            )
        if not self.pairs:
            raise UserError(f"{where}: {path} holds no tensor of the network{self}")


def fit(
    wanted: Mapping[str, tuple[int, ...]],
    offered: Mapping[str, tuple[int, ...]],
    renames: Sequence[Rename] = (),
    aliases: Mapping[str, str] | None = None,
    derived: Iterable[str] = (),
    where: str = "weights",
) -> Match:
    """Match the shapes by name that a network wants with those that a source offers.

    Args:
        renames: the first that matches an offered name gives it another; `*` on both sides is the same text.
        aliases: further names of wanted tensors (tied weights). derived: names that need not be there, nor count as
            extra.
    """
    match, used = Match(), [False] * len(renames)
    tied = {name for alias, name in (aliases or {}).items() if alias != name}
    for name, shape in offered.items():
        renamed = name
        for index, rename in enumerate(renames):
            found = _renamed(name, rename)
            if found is not None:
                renamed, used[index] = found, True
                break
        new = (aliases or {}).get(renamed, renamed)
        if new in match.pairs or new in match.mismatched:
            if new in tied:  # under another of its names
                continue
            raise UserError(f"{where}.rename: two tensors become '{new}', the second is '{name}'")
        if new not in wanted:
            if new not in derived:
                match.extra.append(new)
        elif wanted[new] != shape:
            match.mismatched[new] = [list(wanted[new]), list(shape)]
        else:
            match.pairs[new] = name
    for rename, was_used in zip(renames, used, strict=True):
        if not was_used:
            raise UserError(
                f"{where}.rename: '{rename.old}' matches no tensor{nearest(rename.old, offered)}"
            )
    match.missing = [n for n in wanted if n not in match.pairs and n not in match.mismatched]
    return match


def _renamed(name: str, rename: Rename) -> str | None:
    before, star, after = rename.old.partition("*")
    if not star:
        return rename.new if name == rename.old else None
    middle = len(name) - len(before) - len(after)
    if middle < 0 or not (name.startswith(before) and name.endswith(after)):
        return None
    return rename.new.replace("*", name[len(before) : len(before) + middle])


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})"


# ---------------------------------------------------------------------------------------------------------------------
# Where tensors come from


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


def _download(source: str, where: str) -> Path:
    """`hf://ORG/MODEL` or `hf://ORG/MODEL@REVISION`: a folder of the hub's cache, filled where it is not."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}.from: {source} needs huggingface_hub: pip install 'dist-train[hub]'"
        ) from error
    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"],
        )
    except Exception as error:  # of the network, the hub, or the name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}.from: {source} could not be fetched: {reason}") from error
    if not any(Path(folder).rglob("*.safetensors")):
        raise UserError(f"{where}.from: {source} has no safetensors; pickles are never read")
    return Path(folder)
