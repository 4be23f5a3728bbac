"""What pydantic found wrong with a recipe, said in one line: the key, the value, what would be valid."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ValidationError

from dist_train.errors import nearest
from dist_train.settings import short

BRANCHES = ("bool", "int", "float", "literal")
"""What pydantic adds to the place of a mistake in a field of several types."""


def _field_at(root: type[BaseModel], path: tuple[Any, ...]) -> tuple[type[BaseModel] | None, str]:
    """The section that `path` names, if it names one, and the description of the last field on the way."""
    section: type[BaseModel] | None = root
    description = "a recipe"
    for key in path:
        if isinstance(key, int):  # a position in a list of sections
            continue
        fields = section.model_fields if section is not None else {}
        field = fields.get(key) or next((f for f in fields.values() if f.alias == key), None)
        free = (
            field is None and section is not None and section.model_config.get("extra") == "allow"
        )
        section = get_args(get_type_hints(section)["__pydantic_extra__"])[1] if free else None
        if field is not None:
            description = field.description or description
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return section, description


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of `error` in a mapping that was to become a `root`, as `key.path: got ..., expected ...`."""
    mistakes = error.errors(include_url=False)
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    path = tuple(part for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    if path[-1:] and path[-1] in BRANCHES and first["type"] != "extra_forbidden":
        path = path[:-1]
    section, description = _field_at(root, path)
    where = ".".join(map(str, path))
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        line = (
            f"{where}.{message}"
            if where and section
            else f"{where}: {message}"
            if where
            else message
        )
    elif first["type"] == "extra_forbidden":
        section, _ = _field_at(root, path[:-1])
        fields = section.model_fields if section is not None else {}
        keys = [field.alias or name for name, field in fields.items()]
        line = f"{where}: unknown key{nearest(str(path[-1]), keys)} (expected one of {', '.join(keys)})"
    elif first["type"] == "missing":
        line = f"{where}: missing, expected {description}"
    else:
        line = f"{where}: got {short(first['input'])}, expected {description}"
    others = len({m["loc"][0] for m in mistakes if m["loc"]}) - 1
    return line if others < 1 else f"{line} (and {others} more)"
