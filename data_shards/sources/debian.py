"""Files out of Debian packages: downloaded and unpacked by Debian's own tools, without installing anything."""

from __future__ import annotations

from pathlib import Path

from dist_train.data_shards.sources.cache import cache_folder
from dist_train.data_shards.sources.tool import run_tool
from dist_train.errors import UserError


def unpack_package(package: str, into: Path) -> Path:
    """Download `package` and unpack it in the folder `into`; returns the root of its tree. Needs no root rights."""
    into.mkdir(exist_ok=True)
    try:
        run_tool(["apt-get", "download", package], into)
    except UserError:  # this machine has no package lists, or old ones
        environment = private_lists()
        run_tool(["apt-get", "download", package], into, environment)
    root = into / "unpacked"
    for archive in sorted(into.glob("*.deb")):
        run_tool(["dpkg-deb", "-x", archive.name, root.name], into)
    return root


def private_lists(languages: tuple[str, ...] = ()) -> dict[str, str]:
    """Fetch package lists, and descriptions in these languages, into our cache; returns the environment for apt."""
    folder = cache_folder() / "debian"
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    wanted = " ".join(f'"{language}";' for language in languages) or '"none";'
    configuration = folder / "apt.conf"
    configuration.write_text(
        f'Dir::State::lists "{folder}/lists/";\n'
        f'Dir::Cache "{folder}/";\n'
        f"#clear Acquire::Languages;\nAcquire::Languages {{ {wanted} }};\n"
    )
    environment = {"APT_CONFIG": str(configuration)}
    run_tool(["apt-get", "update", "-q"], folder, environment)
    return environment
