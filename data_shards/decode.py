"""From the bytes of a field to its value, and back: an allow-list, in which nothing is ever unpickled."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dist_train.data_shards.pictures import SUFFIXES as PICTURES
from dist_train.data_shards.pictures import decode_picture
from dist_train.errors import UserError

NAMES = {"cls": "label", "txt": "text", **dict.fromkeys(PICTURES, "image")}


def field_name(suffix: str) -> str:
    """The name of a field: `image.npy` -> image, `jpg` -> image, `cls` -> label, `txt` -> text, else what it says."""
    first, dot, _ = suffix.partition(".")
    return first if dot else NAMES.get(suffix, suffix)


@functools.lru_cache(maxsize=256)
def npy_header(header: bytes) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Read an `.npy` header: (dtype, Fortran order, shape, number of elements). Objects are refused."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else None
    shape, fortran, dtype = (read or np.lib.format.read_array_header_2_0)(file)
    if dtype.hasobject:
        raise ValueError(
            "arrays of Python objects are refused, since reading them means unpickling"
        )
    return dtype, fortran, shape, math.prod(shape)


def npy_header_size(view: memoryview) -> int:
    """How many bytes stand before the elements of an `.npy` file."""
    if bytes(view[:6]) != b"\x93NUMPY" or len(view) < 12:
        raise ValueError("not an .npy file")
    if view[6] == 1:
        return 10 + int.from_bytes(view[8:10], "little")
    return 12 + int.from_bytes(view[8:12], "little")


def decode_npy(view: memoryview) -> np.ndarray:
    """Read an `.npy` file as a read-only array over the same memory."""
    start = npy_header_size(view)
    dtype, fortran, shape, count = npy_header(bytes(view[:start]))
    if len(view) != start + count * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype} needs {count * dtype.itemsize} bytes")
    array = np.frombuffer(view, dtype, count, start)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def decode_elements(view: memoryview, dtype: str, shape: list[int | None]) -> np.ndarray:
    """The array whose elements these are; one of one axis may have any length."""
    array = np.frombuffer(view, dtype)
    return array if len(shape) == 1 else array.reshape([size or 0 for size in shape])


DECODERS: dict[str, Callable[[memoryview], Any]] = {
    "npy": decode_npy,
    "cls": lambda view: int(bytes(view)),
    "txt": lambda view: str(view, "utf-8"),
    "json": lambda view: json.loads(bytes(view)),
    **dict.fromkeys(PICTURES, decode_picture),
}


def encode(suffix: str, value: Any) -> bytes:
    """Bytes of `value` by the last part of `suffix`: npy, cls, txt, json; bytes stay as they are."""
    kind = suffix.rpartition(".")[2]
    if isinstance(value, bytes):
        return value
    if kind == "npy":
        file = io.BytesIO()
        np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
        return file.getvalue()
    if kind == "cls":
        return str(int(value)).encode()
    if kind == "txt":
        return str(value).encode()
    if kind == "json":
        return json.dumps(value, sort_keys=True).encode()
    raise UserError(
        f"field '{suffix}': give bytes; of values only npy, cls, txt and json are encoded"
    )
