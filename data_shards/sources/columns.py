"""From columns of a table to fields of samples: each column under a suffix that tells how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dist_train.errors import UserError, nearest

LABELS = ("label", "labels", "cls", "class")
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


def wanted(fields: str | None, columns: Sequence[str]) -> dict[str, list[str]]:
    """{suffix or "": its columns} of `--fields`: "cls=digit,features.npy=age+bmi,text"; all columns if there is none.

    Several columns joined by + make one array of float32. Without a suffix the values tell it.
    """
    if not fields:
        return {f"={name}": [name] for name in columns}
    found: dict[str, list[str]] = {}
    for part in fields.split(","):
        suffix, equals, names = part.strip().partition("=")
        taken = (names if equals else suffix).split("+")
        for name in taken:
            if name not in columns:
                raise UserError(
                    f"fields '{fields}': no column '{name}'{nearest(name, columns)} (there are {', '.join(columns)})"
                )
        key = suffix if equals else f"={suffix}"
        if not key.strip("=") or key in found:
            raise UserError(f"fields '{fields}': '{part}' is not SUFFIX=COLUMN, or comes twice")
        found[key] = taken
    return found


class Field:
    """How one field is made of its columns. `names` are the classes of a label given as text."""

    def __init__(
        self, suffix: str, columns: Sequence[str], row: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        value = row[columns[0]]
        if suffix.startswith("="):
            suffix = "npy" if len(columns) > 1 else suffix_of(columns[0], value)
        self.suffix = suffix if "." in suffix or suffix in PLAIN else f"{suffix}.npy"
        self.columns = columns
        self.classes = {name: number for number, name in enumerate(names)}
        self.make = self._maker()

    def _maker(self) -> Callable[[list[Any]], Any]:
        kind = self.suffix.rpartition(".")[2]
        if kind == "npy":
            return _array if len(self.columns) == 1 else _joined
        if kind == "cls":
            return lambda values: self._label(values[0])
        return lambda values: content(values[0])

    def _label(self, value: Any) -> int:
        if isinstance(value, str):
            return self.classes[value]
        if value != int(value):
            raise ValueError(f"{value} is not a whole number")
        return int(value)

    def __call__(self, row: Mapping[str, Any]) -> Any:
        values = [row[name] for name in self.columns]
        if any(value is None for value in values):
            raise UserError(f"column '{self.columns[values.index(None)]}' is empty")
        try:
            return self.make(values)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"column '{'+'.join(self.columns)}' cannot be '{self.suffix}': {error}"
            ) from error


PLAIN = ("cls", "txt", "json", "jpg", "jpeg", "png", "webp")


def suffix_of(name: str, value: Any) -> str:
    """How a column is stored if nothing else is said, by its name and its first value."""
    plain = "".join(
        letter if letter.isalnum() or letter in "_-" else "_" for letter in name.lower()
    )
    if name.lower() in LABELS and isinstance(value, (int, str)):
        return "cls"
    value = content(value)
    if isinstance(value, bytes):
        picture = next((kind for magic, kind in MAGIC.items() if value.startswith(magic)), None)
        return picture or f"{plain}.bin"
    if isinstance(value, str):
        return "txt" if plain == "text" else f"{plain}.txt"
    if isinstance(value, (bool, int, float, np.ndarray)) or _is_numeric(value):
        return f"{plain}.npy"
    return f"{plain}.json"


def content(value: Any) -> Any:
    """The bytes of a picture that is given as {bytes, path}, as Hugging Face datasets stores them; else the value."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        if value["bytes"] is None:
            raise UserError("a picture that is stored only as a path elsewhere")
        return value["bytes"]
    return value


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list) and value:
        return _is_numeric(value[0])
    return isinstance(value, (bool, int, float))


def _array(values: list[Any]) -> np.ndarray:
    """Whole numbers as int64 and fractions as float32, so that they need not be said."""
    array = np.asarray(values[0])
    if array.dtype.kind == "f" and not isinstance(values[0], np.ndarray):
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise ValueError("not numbers of one shape")
    return array


def _joined(values: list[Any]) -> np.ndarray:
    numbers = [float(value) for value in values]
    if any(math.isnan(number) for number in numbers):
        raise ValueError("not a number")
    return np.array(numbers, np.float32)
