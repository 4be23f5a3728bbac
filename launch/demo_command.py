"""`dist-train demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_train.launch.output import Json, answer


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder of the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train three models on real data; kill one, bring it back."""
    from dist_train.launch.demo import demo as run_demo

    answer(as_json, lambda: run_demo(out), show=lambda result: None)
