"""Packages of the npm registry: their archives, fetched by npm itself; nothing of them is installed or run."""

from __future__ import annotations

from pathlib import Path

from dist_train.data_shards.sources.tool import run_tool


def fetch_archive(package: str, version: str, into: Path) -> None:
    """Put `PACKAGE-VERSION.tgz` into the folder `into`."""
    command = ["npm", "pack", f"{package}@{version}", "--ignore-scripts", "--silent"]
    run_tool(command, into)
