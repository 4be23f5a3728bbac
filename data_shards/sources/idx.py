"""IDX files, the format of MNIST: big-endian arrays with a short header, plain or gzipped."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from dist_train.errors import UserError

DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, in this machine's byte order. UserError: not such a file, or its size is wrong."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if len(content) < max(start, 4) or content[:2] != b"\0\0" or content[2] not in DTYPES:
        raise UserError(f"{path}: not an IDX file")
    dtype = np.dtype(DTYPES[content[2]])
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if len(content) != start + math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {shape} of {dtype} needs {math.prod(shape) * dtype.itemsize} bytes after "
            f"byte {start}, it has {len(content) - start}"
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes (uint8) of any shape as an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + np.ascontiguousarray(array, np.uint8).tobytes())
