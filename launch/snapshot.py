"""The code of a run, copied into its directory: a queued job cannot change under its user."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dist_train
from dist_train.errors import UserError
from dist_train.recipe import Recipe

MAX_BYTES = 64 * 2**20
LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "node_modules", "venv", "build", "dist"),
    *("/data", "/runs", "/wandb", "*.tar", "*.pt", "*.pth", "*.ckpt", "*.safetensors"),
)
"""Names that are no code, wherever they stand; a project's .gitignore adds to them."""


def has_own_parts(recipe: Recipe) -> bool:
    """Whether the recipe names a part by import path, outside dist-train."""
    return any(
        ":" in spec["name"] and not spec["name"].startswith("dist_train.")
        for _, spec, _ in recipe.parts()
    )


def take_snapshot(recipe: Recipe, code: Path) -> None:
    """Copy dist-train, and the recipe's project where the recipe uses parts of it, to `code/` and `code/project/`.

    It is whole or not there. Raises UserError when they hold more than MAX_BYTES.
    """
    part = code.with_name(f".{code.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    folders = {part / "dist_train": Path(dist_train.__file__).parent}
    if has_own_parts(recipe):
        folders[part / "project"] = recipe.root
    for target, source in folders.items():
        files = list(_files(source, _ignored(source)))
        size = sum(file.stat().st_size for file in files)
        if size > MAX_BYTES:
            largest = max(files, key=lambda file: file.stat().st_size)
            raise UserError(
                f"{source}: {size:,} bytes of code, expected at most {MAX_BYTES:,}"
                f" (the largest is {largest}); name what is no code in {source / '.gitignore'}"
            )
        target.mkdir(parents=True)
        for file in files:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    part.rename(code)


def _ignored(source: Path) -> tuple[str, ...]:
    """LEFT_OUT and the plain patterns of .gitignore. What it re-includes (`!...`) stays in."""
    file = source / ".gitignore"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    patterns = [line.strip() for line in lines]
    return (*LEFT_OUT, *(p.rstrip("/") for p in patterns if p and p[0] not in "#!"))


def _files(source: Path, ignored: tuple[str, ...]) -> Iterator[Path]:
    """The regular files of a tree in order of name, through links of folders within it (dist_train/models is one)."""
    for folder, folders, names in os.walk(source, followlinks=source.name == "dist_train"):
        here = Path(folder)

        def left_out(name: str, here: Path = here) -> bool:
            path = "/" + (here / name).relative_to(source).as_posix()
            return any(
                fnmatch.fnmatchcase(path if "/" in pattern else name, _anchored(pattern))
                for pattern in ignored
            )

        folders[:] = sorted(name for name in folders if not left_out(name))
        for name in sorted(names):
            if not left_out(name) and (here / name).is_file() and not (here / name).is_symlink():
                yield here / name


def _anchored(pattern: str) -> str:
    """`/data` and `docs/build` count from the root of the project, as git reads them."""
    return "/" + pattern.removeprefix("/") if "/" in pattern else pattern
