"""Starting weights: a run, a safetensors file, a folder or a name of the Hugging Face hub, loaded before step 0.

Every rank reads only the slices that it holds, whatever the strategy. Names are those within the network, where source
and player have one each, else NETWORK.NAME.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train import checkpoint
from dist_train.engine.views import plain_name
from dist_train.errors import UserError
from dist_train.run_directory import write_file
from dist_train.settings import how_to_make
from dist_train.starting_weights.hub import HUB, download
from dist_train.starting_weights.match import Match, fit
from dist_train.starting_weights.sources import Source, open_source

if TYPE_CHECKING:
    from dist_train.engine import Engine
    from dist_train.recipe import Recipe
    from dist_train.recipe.sections import Weights
    from dist_train.run_directory import RunDirectory
    from dist_train.world import World


def find(weights: Weights, root: Path, where: str = "weights") -> Path:
    """Where the weights lie: a checkpoint, a safetensors file, or a folder of such; a hub name is downloaded.

    Raises UserError when there is nothing to load. A run's checkpoint is digested here.
    """
    source = weights.source
    if source.startswith(HUB):
        return download(source, where)
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
        f" model.safetensors, or hf://ORG/MODEL; there is {reason} at {path}{how_to_make(path)}"
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
            path = download(weights.source, where)  # the cache may be another machine's
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
