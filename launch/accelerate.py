"""`accelerate launch`: it says by environment variables what a recipe says too, and the two must agree.

The only file that knows accelerate. Its Accelerator is not used: its launcher starts our ranks as torchrun does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.recipe import Recipe


def check_accelerate_environment(recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Raise UserError where accelerate was told something else than the recipe.

    accelerate exports ACCELERATE_MIXED_PRECISION=no and ACCELERATE_DYNAMO_BACKEND=NO when nothing was asked: unset.
    """
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", recipe.precision):
        raise _differ("ACCELERATE_MIXED_PRECISION", precision, "precision", recipe.precision)
    dynamo = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise _differ(
            "ACCELERATE_DYNAMO_BACKEND", dynamo, "compile", "nothing: networks run as they are"
        )
    if _true(environ.get("ACCELERATE_USE_FSDP")):
        raise _differ("ACCELERATE_USE_FSDP", "true", "strategy", _strategies(recipe))
    if _true(environ.get("ACCELERATE_USE_DEEPSPEED")):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        asked = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}.get(stage)
        if asked is not None and any(one["name"] != asked for one in recipe.strategies.values()):
            raise _differ("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage, "strategy", _strategies(recipe))


def _differ(variable: str, value: str, key: str, setting: str) -> UserError:
    return UserError(
        f"{key}: the recipe says {setting}, but accelerate launch says {variable}={value}; expected them to agree"
    )


def _strategies(recipe: Recipe) -> str:
    return ", ".join(sorted({one["name"] for one in recipe.strategies.values()}))


def _true(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true", "yes", "y", "on", "t")
