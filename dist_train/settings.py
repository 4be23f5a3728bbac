"""The settings of a recipe as plain data: found, read, merged and changed, before anyone asks what they mean."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError, nearest
from dist_train.yaml_text import MAX_BYTES, read_yaml

RECIPES = (Path(__file__).parent / "recipes").resolve()


def short(value: object) -> str:
    """A value as one short line."""
    text = json.dumps(value, ensure_ascii=True) if isinstance(value, dict | list) else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def recipe_names() -> list[str]:
    """The recipes that come with dist-train."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def how_to_make(run: Path) -> str:
    """What trains a run that is not there, as recipes name those that they need: after one that comes with dist-train;
    nothing of others."""
    known = run.name in recipe_names()
    return f"; first `dist-train train {run.name} --run-dir {run}`" if known else ""


def read_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`["block=256"]` as {"block": 256}: each value is read as YAML, dots in a key go deeper."""
    settings: dict[str, Any] = {}
    for text in texts:
        put(settings, *assignment(text))
    return settings


def locate(recipe: str) -> Path:
    """The file behind a name in recipes/, a YAML file or a run directory."""
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{recipe}: a folder without recipe.yaml, expected a run directory")
        path = path / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"{recipe}: no such recipe: expected a YAML file, a run directory or a name of `dist-train list`"
            + nearest(recipe, recipe_names())
        )
    return path.resolve()


def read_settings(file: Path, source: str, children: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file over those of the recipe it extends."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{source}: {file.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}"
            )
        settings = read_yaml(file.read_bytes(), source)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if settings is None:
        raise UserError(
            f"{source}: empty, expected a recipe: data, model, objective, optimizer, duration"
        )
    if not isinstance(settings, dict):
        raise UserError(f"{source}: got {short(settings)}, expected a mapping of settings")
    parent = settings.pop("extends", None)
    if parent is None:
        return merge({}, settings)
    if not isinstance(parent, str):
        raise UserError(f"{source}: extends: got {short(parent)}, expected one recipe")
    by_path = "/" in parent or parent.endswith((".yaml", ".yml"))
    try:
        parent_file = locate(str(file.parent / parent) if by_path else parent)
    except UserError as error:
        raise UserError(f"{source}: extends: {error}") from None
    chain = (*children, file)
    if parent_file in chain:
        names = " -> ".join(path.stem for path in (*chain, parent_file))
        raise UserError(f"{source}: extends: got {short(parent)}, expected no circle: {names}")
    inherited = read_settings(parent_file, str(parent_file) if by_path else parent, chain)
    return merge(inherited, settings)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: mappings key by key, anything else whole; null removes."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: expected KEY=VALUE, like optimizer.learning_rate=0.05")
    return key.strip(), read_yaml(value, f"--set {text}")


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at the dotted `key`; None removes what is there."""
    *folders, last = key.split(".")
    node: Any = settings
    path = ""
    for part in folders:
        path = f"{path}.{part}" if path else part
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        elif isinstance(node, list):
            node = node[_position(node, part, path)]
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: '{path}' is {short(node)}, which has no keys")
    if not last:
        raise UserError(f"{key}: expected a key, like optimizer.learning_rate")
    if isinstance(node, list):
        position = _position(node, last, key)
        node[position : position + 1] = [] if value is None else [value]
    elif value is None:
        node.pop(last, None)
    else:
        node[last] = merge({}, value) if isinstance(value, dict) else value


def _position(items: list[Any], text: str, key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= len(items):
        raise UserError(
            f"{key}: a list of {len(items)}, expected a position from 0 to {len(items) - 1}"
        )
    return int(text)


def plain(value: Any, path: str) -> Any:
    """Plain data with finite numbers, nulls dropped from mappings: what YAML and JSON can hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{path}: got {short(key)} as a key, expected a name")
        return {
            key: plain(item, f"{path}.{key}" if path else key)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}.{position}") for position, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: got {value}, expected a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{path}: got {short(value)}, expected plain data (text, number, list, mapping)"
    )


def name_from(file: Path) -> str:
    stem = file.parent.name if file.name == "recipe.yaml" else file.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "run"


def root_of(file: Path) -> Path | None:
    """The project root of a recipe file; None, the current folder, for the recipes that come with dist-train."""
    if file.parent == RECIPES:
        return None
    if file.name in ("recipe.yaml", "best.yaml"):  # of a run or a sweep, far from its project
        folder = file.parent
        for noted in ("environment.json", "launch.json", "../launch.json"):  # of an array's member
            if (folder / noted).is_file():
                root = json.loads((folder / noted).read_text()).get("project_root")
                if root is not None and Path(root).is_dir():
                    return Path(root)
    for folder in file.parents:
        if (folder / "pyproject.toml").is_file():
            return folder
    return file.parent
