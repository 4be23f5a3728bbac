"""`dist-train list`: the recipes and the parts that there are."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

import typer

from dist_train.errors import UserError, nearest
from dist_train.launch.output import Json, answer

BY_THE_CALLER = {
    "metric": ("outputs", "micro"),
    "schedule": ("step", "total", "warmup", "cuts"),
    "search": ("space", "seed"),
}


def register(app: typer.Typer) -> None:
    app.command("list")(list_parts)


def list_parts(
    kind: Annotated[
        str | None, typer.Argument(help="recipe, model, objective, optimizer, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """List recipes and parts, with their arguments."""
    answer(as_json, lambda: catalogue(kind), show=_show)


def catalogue(kind: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind: {name: {"about": one line, "arguments": [text]}}} of one kind, or of all."""
    from dist_train.components import CATALOGUE

    kinds = ["recipe", *CATALOGUE]
    if kind is not None and kind not in kinds:
        raise UserError(f"list {kind}: expected one of {', '.join(kinds)}{nearest(kind, kinds)}")
    return {
        one: _recipes() if one == "recipe" else {name: _part(one, name) for name in CATALOGUE[one]}
        for one in ([kind] if kind else kinds)
    }


def _recipes() -> dict[str, dict[str, Any]]:
    from dist_train.settings import RECIPES, recipe_names

    found = {}
    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        found[name] = {"about": first.removeprefix("#").strip(), "arguments": []}
    return found


def _part(kind: str, name: str) -> dict[str, Any]:
    """The first sentence of a part's docstring, and those of its arguments that a recipe gives."""
    from dist_train import components
    from dist_train.recipe import PROVIDED

    try:
        part = components.resolve(kind, name)
    except UserError as error:  # an optional package is not installed
        return {"about": str(error), "arguments": []}
    given = BY_THE_CALLER.get(kind, PROVIDED.get(kind, ()))
    arguments = [
        parameter.name
        if parameter.default is inspect.Parameter.empty
        else f"{parameter.name}={parameter.default!r}"
        for parameter in components.arguments(part).values()
        if parameter.name not in given
    ]
    paragraph = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
    return {"about": re.split(r"(?<=\.)\s(?=[A-Z])", paragraph)[0], "arguments": arguments}


def _show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    for kind, parts in found.items():
        typer.secho(kind, bold=True)
        width = max(map(len, parts))
        for name, part in parts.items():
            typer.echo(f"  {name:<{width}}  {part['about']}")
            if part["arguments"]:
                typer.echo(f"  {'':<{width}}  ({', '.join(part['arguments'])})")
