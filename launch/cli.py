"""The command line: `dist-train COMMAND ...`.

Each command of the files beside this one parses its arguments and calls one function of the library, imported inside
the command, so that `--help` imports neither torch nor pydantic.

Exit codes: 0 done, 1 failed, 2 a mistake in the recipe or the command, 75 requeue, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dist_train.errors import Interrupted, UserError
from dist_train.launch import (
    catalogue,
    checkpoints,
    demo_command,
    diagnose,
    doctor,
    launch,
    new,
    plan,
    shards,
    train,
    trained,
    verify,
)
from dist_train.launch.output import fail
from dist_train.launch.sweep import command as sweep

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="dist-train",
    help="Train on one machine or many; kill any run and bring it back bit for bit.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
)


def _version(asked: bool) -> None:
    if asked:
        from dist_train import __version__

        typer.echo(f"dist-train {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


demo_command.register(app)
shards.register(app)
train.register(app)
launch.register(app)
sweep.register(app)
trained.register(app)
checkpoints.register(app)
diagnose.register(app)
catalogue.register(app)
doctor.register(app)
new.register(app)
plan.register(app)
verify.register(app)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. A user's mistake is one line on stderr, without a traceback."""
    as_json = "--json" in arguments
    try:
        return app(args=list(arguments), prog_name="dist-train", standalone_mode=False) or DONE
    except UserError as error:
        return fail(str(error), as_json, MISTAKE)
    except typer.TyperException as error:
        return fail(f"{error.format_message().rstrip('.')} (see --help)", as_json, error.exit_code)
    except Interrupted as error:
        return fail(str(error), as_json, error.code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", as_json, INTERRUPTED)
    except BrokenPipeError:  # `dist-train list | head`
        sys.stderr.close()
        return FAILED
    except Exception as error:
        from dist_train.ranks import RankFailed

        if not isinstance(error, RankFailed):  # whose message holds the traceback of the rank
            traceback.print_exc()
        return fail(str(error) or type(error).__name__, as_json, FAILED)
