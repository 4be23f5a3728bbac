"""`dist-train new`: a small tested project with parts of one's own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.errors import UserError, writing
from dist_train.launch.output import Json, answer

TEMPLATES = Path(__file__).parent / "templates" / "project"
FILES = {
    ".gitignore": "gitignore.jinja",
    "README.md": "README.md.jinja",
    "digits.yaml": "digits.yaml.jinja",
    "pyproject.toml": "pyproject.toml.jinja",
    "{package}/__init__.py": "__init__.py.jinja",
    "{package}/callbacks.py": "callbacks.py.jinja",
    "{package}/metrics.py": "metrics.py.jinja",
    "{package}/networks.py": "networks.py.jinja",
    "{package}/objectives.py": "objectives.py.jinja",
    "tests/test_project.py": "test_project.py.jinja",
}


def register(app: typer.Typer) -> None:
    app.command("new")(new)


def new(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The new folder; its name is the package's.")
    ],
    as_json: Json = False,
) -> None:
    """Write a small tested project with parts of one's own."""
    answer(as_json, lambda: create_project(directory))


def create_project(directory: Path) -> dict[str, Any]:
    """Write the project; UserError when the folder is in use or its name cannot be a package's."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    directory = directory.resolve()
    package = re.sub(r"\W", "_", directory.name).lower()
    if not re.fullmatch(r"[a-z]\w*", package):
        raise UserError(
            f"new {directory}: '{directory.name}' cannot name a package, expected a letter first"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"new {directory}: exists already, expected a new or an empty folder")
    if importlib.util.find_spec(package) is not None:
        raise UserError(
            f"new {directory}: a package '{package}' is installed already, expected another name"
        )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )  # plain text files, no HTML: nothing to escape
    written = []
    for target, template in FILES.items():
        path = directory / target.format(package=package)
        text = environment.get_template(template).render(package=package)
        with writing(directory):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        written.append(str(path.relative_to(directory)))
    return {"directory": str(directory), "package": package, "files": written}
