"""What commands print: a table for people, with --json one JSON value on stdout and nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable."),
]


def answer(
    as_json: bool, work: Callable[[], Any], show: Callable[[Any], None] | None = None
) -> Any:
    """Do the work, print its result (by `show`, else as a table) and return it.

    Of the ranks that a launcher started, only rank 0 prints.
    """
    if as_json:
        with _stdout_to_stderr():
            result = work()
    else:
        result = work()
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            typer.echo(json.dumps(result, default=str))
        else:
            (show or table)(result)
    return result


def fail(message: str, as_json: bool, code: int) -> int:
    """Report what went wrong; returns `code`."""
    if as_json:
        typer.echo(json.dumps({"error": message}))
    else:
        typer.echo(f"error: {message}", err=True)
    return code


def table(result: Mapping[str, Any]) -> None:
    """Print a mapping as aligned lines, `key  value`; mappings in it with their keys joined by dots."""
    lines = list(_flat(result))
    width = max((len(key) for key, _ in lines), default=0)
    for key, value in lines:
        typer.echo(f"{key:<{width}}  {value}")


def _flat(result: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", _text(value)


def _text(value: Any) -> str:
    if value is None or value in ("", []):
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(item, str | float) for item in value):
        return ", ".join(map(_text, value))
    return str(value)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal; gives the function that hears (samples more, of how many or None)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    count = TextColumn(f"{what} {{task.completed:,.0f}} samples")
    with Progress(
        count,
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda samples, total: bar.update(task, advance=samples, total=total)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever this process and its children write to stdout goes to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
