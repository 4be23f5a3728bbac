"""A recipe's data section becomes shards, orders and batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
from pathlib import Path
from typing import Any

from dist_train import components
from dist_train.data_shards.assembler import Assembler, derived
from dist_train.data_shards.cache import Cache
from dist_train.data_shards.index import Index
from dist_train.data_shards.loader import EvaluationBatches, Stream, TrainingBatches
from dist_train.data_shards.mixture import Mixture, Together
from dist_train.data_shards.order import Bootstrap, Order, Ordering
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sizes import bytes_of
from dist_train.data_shards.sources import locate
from dist_train.data_shards.storage import Bucket
from dist_train.data_shards.tokens import Tokenizer
from dist_train.data_shards.tokens import load as load_tokenizer
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.recipe.data import Source
from dist_train.recipe.data import Stream as Settings
from dist_train.recipe.sections import EvaluationSet
from dist_train.settings import short
from dist_train.world import World


def data_folders(recipe: Recipe) -> list[Path]:
    """The folders of the recipe's shards, those of this machine; named data are packed on first use."""
    return [
        _folder(recipe, source)
        for stream, _ in recipe.data.located()
        for source in stream.origins
        if not source.is_remote
    ]


def describe(recipe: Recipe) -> dict[str, Any]:
    """The values that `auto` can take in the recipe: those that all its streams agree on."""
    return _agreed([_open(recipe, stream, stream.split) for stream, _ in recipe.data.located()])


class RunData:
    """The training data of a run on one rank.

    Attributes:
        batches: what the trainer reads. known: what `auto` can take.
        samples: places an epoch has, that of the longest stream. tokens: what they hold, where that is known.
        statistics: of its fields, by name.
        fingerprint: of all indexes; a run resumes on no other.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        data = recipe.data
        opened = {name: _open(recipe, stream, stream.split) for name, stream in data.named.items()}
        if world.rank == 0:
            _tell_what_is_left_out(opened)
        streams = {}
        members = recipe.members
        own_rows = members is not None and members.heads is None
        for (name, shards), (settings, where) in zip(opened.items(), data.located(), strict=True):
            # of members each has the order and the draws that the run of its own seed has
            for member in range(members.count if members and own_rows else 1):
                seed = derived(recipe.seed + member, name)
                order = _order(settings, shards, seed, recipe)
                transforms = _transforms(settings, where, "train", shards)
                assembler = _assembler(shards, seed, transforms, settings, where)
                streams[str(member) if own_rows else name] = Stream(order, assembler)
        self.batches = TrainingBatches(
            streams,
            global_batch=data.global_batch,
            micro_batch=data.micro_batch,
            rank=world.rank,
            world_size=world.size,
            workers=data.workers,
            prefetch=data.prefetch,
            device=world.device,
            together=own_rows,
        )
        longest = max(opened.values(), key=len)
        self.samples, self.tokens = len(longest), longest.tokens
        self.known = _agreed(list(opened.values()))
        self.statistics = {
            f"{stream}.{field}" if stream else field: moments
            for stream, shards in opened.items()
            for field, moments in shards.index.statistics.items()
        }
        prints = [shards.index.fingerprint for shards in opened.values()]
        self.fingerprint = prints[0]
        if len(prints) > 1:
            self.fingerprint = hashlib.sha256(" ".join(prints).encode()).hexdigest()


def evaluation_sets(recipe: Recipe, world: World) -> dict[str, EvaluationBatches]:
    """The evaluation batches of this rank, of each of the recipe's further sets."""
    assert recipe.evaluate is not None
    return {
        name: evaluation_batches(
            recipe, world, one.split, _folder(recipe, one) if one.name or one.path else None
        )
        for name, one in recipe.evaluate.sets.items()
    }


def evaluation_batches(
    recipe: Recipe, world: World, split: str, folder: Path | None = None
) -> EvaluationBatches:
    """The evaluation batches of this rank over a split: of the recipe's own data, or of the shards in `folder`, which
    are brought to the scale of the recipe's own."""
    assemblers = {}
    for name, (settings, where) in zip(recipe.data.named, recipe.data.located(), strict=True):
        if folder is None:
            shards = _open(recipe, settings, split)
        else:
            shards = _foreign(folder, split, _open(recipe, settings, settings.split))
        if recipe.evaluate and "bits_per_byte" in recipe.evaluate.metrics:
            _check_bytes(shards)
        transforms = _transforms(settings, where, "evaluate", shards)
        assemblers[name] = _assembler(shards, 0, transforms, settings, where)
    micro_batch = recipe.evaluate.micro_batch if recipe.evaluate else None
    return EvaluationBatches(
        assemblers,
        micro_batch=micro_batch or recipe.data.micro_batch,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        device=world.device,
    )


def _check_bytes(shards: Shards | Together) -> None:
    """UserError: a token of these shards is no byte, so that bits per token are not bits per byte."""
    if shards.index.vocabulary not in (None, 256, 257):
        raise UserError(
            f"evaluate.metrics: bits_per_byte needs data whose tokens are bytes; '{shards.index.name}' has a vocabulary"
            f" of {shards.index.vocabulary}: use perplexity or loss"
        )


def _foreign(folder: Path, split: str, own: Shards | Together) -> Shards:
    """Shards that a network is used on, with the statistics and the classes of those that it was trained on."""
    index = Index.load(folder)
    if index.classes and own.index.classes and index.classes != own.index.classes:
        raise UserError(
            f"{folder}: has the classes {short(index.classes)}, but the network was trained on"
            f" {short(own.index.classes)}"
        )
    return Shards(folder, split, dataclasses.replace(index, statistics=own.index.statistics))


def _folder(recipe: Recipe, source: Source | EvaluationSet) -> Path:
    return locate(source.name or str(source.path), recipe.root, **source.options)


def _bucket(recipe: Recipe, source: Source) -> Bucket:
    kept = recipe.data.cache
    cache = Cache(recipe.root / Path(kept.dir).expanduser(), bytes_of(kept.size))
    return Bucket(str(source.path), cache, source.index or "")


def _open(recipe: Recipe, stream: Settings, split: str) -> Shards | Together:
    parts = [_part(recipe, source, split) for source in stream.origins]
    if stream.sources is None:
        return parts[0]
    return Together(parts, [source.weight for source in stream.sources])


def _tell_what_is_left_out(opened: dict[str, Shards | Together]) -> None:
    parts = [getattr(shards, "parts", [shards]) for shards in opened.values()]
    for part in dict.fromkeys(itertools.chain.from_iterable(parts)):
        for lost in part.index.left_out:
            logging.getLogger("dist_train").warning("data: left out: %s", lost)


def _part(recipe: Recipe, source: Source, split: str) -> Shards:
    if source.is_remote:
        return Shards.remote(_bucket(recipe, source), split)
    folder = _folder(recipe, source)
    return Shards(folder, split, Index.load(folder, source.on_damage))


def _order(settings: Settings, shards: Shards | Together, seed: int, recipe: Recipe) -> Ordering:
    """The order of a stream. What draws from everywhere, or from several sources, has no streams."""
    batch, shuffle, streams = recipe.data.global_batch, settings.shuffle, settings.streams
    if settings.resample is not None and shuffle == "auto":
        shuffle = "global"
    if settings.resample is not None or settings.sources is not None:
        streams = 1

    def order(part: Shards, seed: int) -> Order:
        window = settings.window
        return part.order(seed, batch, shuffle=shuffle, window=window, streams=streams)

    made: Ordering
    if isinstance(shards, Together):
        orders = [order(part, derived(seed, str(i))) for i, part in enumerate(shards.parts)]
        made = Mixture(orders, [source.weight for source in settings.origins])
    else:
        made = order(shards, seed)
    if settings.resample is None:
        return made
    return Bootstrap(made, seed if settings.resample.seed is None else settings.resample.seed)


def _transforms(settings: Settings, where: str, mode: str, shards: Shards | Together) -> list[Any]:
    statistics = shards.index.statistics
    made = []
    for i, spec in enumerate(getattr(settings.transforms, mode)):
        place = f"{where}.transforms.{mode}.{i}"
        part = components.resolve("transform", spec["name"], f"{place}.name")
        if {"sample", "rng"} <= set(components.arguments(part)):  # a function, not what makes one
            given = {key: value for key, value in spec.items() if key != "name"}
            made.append(functools.partial(part, **given))
        else:
            provided: dict[str, Any] = {"statistics": statistics}
            if "beside" in components.arguments(part) and "tokenizer" not in spec:
                provided["beside"] = _tokenizer(place, shards)
            made.append(components.build("transform", spec, place, **provided))
    return made


def _assembler(
    shards: Shards | Together, seed: int, transforms: list[Any], settings: Settings, where: str
) -> Assembler:
    on_device = settings.transforms.on == "device"
    try:
        return Assembler(shards, seed, transforms, settings.scale, on_device)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _tokenizer(where: str, shards: Shards | Together) -> Tokenizer | None:
    """The tokenizer beside the shards, if there is one."""
    parts = getattr(shards, "parts", [shards])
    if len({part.index.tokenizer for part in parts}) > 1:
        raise UserError(f"{where}.tokenizer: missing, expected a path: the sources have several")
    if parts[0].index.tokenizer is None:
        return None
    if isinstance(parts[0].storage, Bucket):
        raise UserError(
            f"{where}.tokenizer: missing, expected the path of a copy of {parts[0].storage.name}/tokenizer.json"
        )
    return load_tokenizer(parts[0].folder)


def _agreed(opened: list[Shards] | list[Shards | Together]) -> dict[str, Any]:
    known = [shards.index.describe() | {"num_samples": len(shards)} for shards in opened]
    return {
        key: value
        for key, value in known[0].items()
        if all(other.get(key) == value for other in known[1:])
    }
