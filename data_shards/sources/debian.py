"""Files out of Debian packages: downloaded and unpacked by Debian's own tools, without installing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.data_shards.sources.cache import cache_folder
from dist_train.data_shards.sources.tool import run_tool
from dist_train.errors import UserError

HELPER = "/usr/lib/apt/apt-helper"


def unpack_package(package: str, into: Path) -> Path:
    """Download `package` and unpack it in the folder `into`; returns the root of its tree. Needs no root rights."""
    into.mkdir(exist_ok=True)
    try:
        run_tool(["apt-get", "download", package], into)
    except UserError:  # this machine has no package lists, or old ones
        run_tool(["apt-get", *private_lists(), "download", package], into)
    root = into / "unpacked"
    for archive in sorted(into.glob("*.deb")):
        run_tool(["dpkg-deb", "-x", archive.name, root.name], into)
    return root


def private_lists() -> list[str]:
    """Fetch package lists into our cache, and touch no others; returns the options that make apt use them."""
    folder, options = _folder("packages")
    run_tool(["apt-get", *options, "update", "-q"], folder)
    return options


def fetch_descriptions(languages: Sequence[str], into: Path) -> None:
    """Put `Translation-LANGUAGE`, the descriptions of all packages in each language, into the folder `into`.

    apt checks them against the signed release. They are those of the Debian release that this machine's sources name.
    """
    folder, options = _folder("descriptions")
    options += ["-o", f"Acquire::Languages={','.join(languages)}"]
    options += ["-o", "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false"]
    run_tool(["apt-get", *options, "update", "-q"], folder)
    for language in languages:
        found = sorted((folder / "lists").glob(f"*_main_i18n_Translation-{language}*"))
        if not found:
            raise UserError(f"this machine's package sources have no descriptions in '{language}'")
        texts = [run_tool([HELPER, "cat-file", str(path)], folder) for path in found]
        (into / f"Translation-{language}").write_text("\n".join(texts), encoding="utf-8")


def _folder(name: str) -> tuple[Path, list[str]]:
    """A folder of the cache for apt's own files, and the options that make it use that."""
    folder = cache_folder() / "debian" / name
    for part in ("lists", "archives"):
        (folder / part / "partial").mkdir(parents=True, exist_ok=True)
    return folder, ["-o", f"Dir::State::lists={folder}/lists/", "-o", f"Dir::Cache={folder}/"]
