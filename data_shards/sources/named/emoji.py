"""Emoji in the styles of two families of pictures, aligned: the same keys, names and classes in both."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards.pictures import decode_picture
from dist_train.data_shards.sources.cache import cached
from dist_train.data_shards.sources.npm import fetch_archive
from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.write import Row, split_of

VERSION = "16.0.0"
DIGESTS = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
LICENCES = {
    "google": "Apache-2.0 (Noto Emoji by Google); names MIT (emoji-data by Cal Henderson)",
    "twitter": "CC-BY-4.0 (Twemoji by Twitter and others); names MIT (emoji-data by Cal Henderson)",
}
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def emoji_google(alpha: bool = False) -> Source:
    """3,786 emoji by Google, 64 x 64 colours on white (with `alpha` RGBA), their names and 10 categories."""
    return _emoji("google", alpha)


def emoji_twitter(alpha: bool = False) -> Source:
    """3,786 emoji by Twitter, 64 x 64 colours on white (with `alpha` RGBA), their names and 10 categories."""
    return _emoji("twitter", alpha)


def _emoji(style: str, alpha: bool) -> Source:
    package = f"emoji-datasource-{style}"
    archive = f"{package}-{VERSION}.tgz"
    folder = cached(
        f"emoji-{style}",
        {archive: DIGESTS[style]},
        lambda into: fetch_archive(package, VERSION, into),
    )
    files = _read(folder / archive, f"package/img/{style}/64/")
    emoji = sorted(json.loads(files["emoji.json"]), key=lambda one: one["sort_order"])
    classes = sorted({one["category"] for one in emoji})
    return Source(
        f"emoji-{style}",
        _samples(emoji, files, classes, alpha),
        f"npm package {package} {VERSION}",
        LICENCES[style],
        classes,
        total=sum(1 + len(one.get("skin_variations", {})) for one in emoji),
    )


def _samples(
    emoji: list[dict[str, Any]], files: dict[str, bytes], classes: list[str], alpha: bool
) -> Iterator[Row]:
    """All skin tones of one emoji are in the same split: they are nearly the same picture."""
    for one in emoji:
        split = split_of(Path(one["image"]).stem)
        variations = [("", one), *sorted(one.get("skin_variations", {}).items())]
        for tones, variation in variations:
            skin = " and ".join(SKIN_TONES[tone] for tone in tones.split("-") if tone)
            name = one["name"].lower() + (f", {skin} skin tone" if skin else "")
            pixels = decode_picture(memoryview(files[variation["image"]]), 4)
            fields = {
                "image.npy": pixels if alpha else _on_white(pixels),
                "cls": classes.index(one["category"]),
                "txt": name,
            }
            yield split, Path(variation["image"]).stem, fields


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) -> (H, W, 3): RGBA laid on white."""
    opacity = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _read(archive: Path, folder: str) -> dict[str, bytes]:
    """The files of `folder` in the archive, and emoji.json."""
    files = {}
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.isreg() and member.name.startswith((folder, "package/emoji.json")):
                content = members.extractfile(member)
                assert content is not None
                files[Path(member.name).name] = content.read()
    return files
