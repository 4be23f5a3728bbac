"""`dist-train shards`: make, index, tokenise, check and show tar shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.launch.output import Json, Settings, answer, progress, table

Folder = Annotated[Path, typer.Argument(help="A folder of tar shards.")]

shards = typer.Typer(help="Make, index, check and show tar shards.", rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.add_typer(shards, name="shards")


@shards.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(help="A name (see `list source`), hf://OWNER/NAME, a file or a folder."),
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    shard_size: Annotated[
        str, typer.Option(help="The size of a shard, or a number of samples.")
    ] = "256MiB",
    records: Annotated[
        int,
        typer.Option(min=0, help="Samples that share a member a field, for small ones; 0: none."),
    ] = 0,
    fields: Annotated[
        str | None,
        typer.Option(help="Of tables and arrays: SUFFIX=COLUMN,... like cls=digit,x.npy=age+bmi."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="For what is in none: a name, or NAME=FRACTION,... by key."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads that write; one a core if not given."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Pack a source into tar shards with their index.

    After a kill the same command goes on.
    """
    from dist_train.data_shards.sources import pack as pack_source
    from dist_train.settings import read_assignments

    given = {"fields": fields, "split": split}
    options = read_assignments(settings or []) | {k: v for k, v in given.items() if v is not None}
    size = int(shard_size) if shard_size.isdecimal() else shard_size

    def work() -> dict[str, Any]:
        with progress("packed") as heard:
            made = pack_source(
                source,
                out,
                shard_size=size,
                records=records,
                workers=workers,
                progress=heard,
                **options,
            )
        return _described(out, made)

    answer(as_json, work)


@shards.command()
def index(
    path: Folder,
    on_damage: Annotated[
        str, typer.Option(help="stop, or skip: leave out what is damaged, and count it.")
    ] = "stop",
    decode: Annotated[bool, typer.Option(help="Read every sample, too.")] = False,
    as_json: Json = False,
) -> None:
    """Index tars that came from elsewhere.

    With --on-damage skip, what is damaged is left out.
    """
    from dist_train.data_shards.indexing import index_shards

    answer(
        as_json,
        lambda: _described(path, index_shards(path, on_damage=on_damage, decode_all=decode)),
    )


@shards.command()
def tokenizer(
    path: Folder,
    tokens: Annotated[str, typer.Option(help="byte, character or bpe.")] = "bpe",
    vocab_size: Annotated[int | None, typer.Option(help="Ids, of bpe.")] = None,
    fields: Annotated[
        str | None, typer.Option(help="Text fields, like en,fr; all if not given.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to train on.")] = "train",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on the texts of a set.

    It is kept beside them, for the transform `tokenise`.
    """
    from dist_train.data_shards.train_tokenizer import train_tokenizer

    names = fields.split(",") if fields else []
    answer(
        as_json,
        lambda: _described(
            path, train_tokenizer(path, tokens, vocab_size, fields=names, split=split)
        ),
    )


@shards.command()
def check(path: Folder, as_json: Json = False) -> None:
    """Digest every shard again and compare with the index."""
    from dist_train.data_shards.indexing import check as check_shards

    result = answer(as_json, lambda: {"path": str(path), "differences": check_shards(path)})
    if result["differences"]:
        raise typer.Exit(1)


@shards.command()
def show(path: Folder, as_json: Json = False) -> None:
    """Show what the index says."""
    from dist_train.data_shards.index import Index

    def work() -> dict[str, Any]:
        loaded = Index.load(path)
        return {"path": str(path), **loaded.describe(), "index": json.loads(loaded.to_json())}

    answer(as_json, work, show=lambda result: table(_described(path, Index.load(path))))


def _described(path: Path, made: Any) -> dict[str, Any]:
    """What a person wants to know of an index first."""
    return {
        "path": str(path),
        "samples": {split: made.samples(split) for split in made.splits},
        "shards": sum(map(len, made.splits.values())),
        "bytes": sum(shard.bytes for shard in made.shards()),
        **made.describe(),
        "licence": made.licence,
        **({"left_out": [str(lost) for lost in made.left_out]} if made.left_out else {}),
        "fingerprint": made.fingerprint,
    }
