"""Grids of images as PNG files, without an image library."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"\x89PNG\r\n\x1a\n"


def encode(pixels: np.ndarray) -> bytes:
    """PNG of `pixels`, uint8, (H, W) grey or (H, W, 3) colour or (H, W, 4) colour and opacity."""
    height, width = pixels.shape[:2]
    colour_type = {1: 0, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    lines = pixels.reshape(height, -1)
    filtered = np.zeros((height, lines.shape[1] + 1), dtype=np.uint8)  # each line: filter 0, bytes
    filtered[:, 1:] = lines
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def grid(images: Any, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay images (N, C, H, W) in [0, 1] out in a grid, uint8 (rows, columns) or with C last.

    C is 1 (grey), 3 or 4. The grid is about square unless `columns` says otherwise, with `gap`
    white pixels between images.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or 0 in images.shape:
        raise ValueError(f"images: expected (N, C, H, W) with C of 1, 3 or 4, got {images.shape}")
    count, channels, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    bytes_ = np.rint(np.nan_to_num(images).clip(0.0, 1.0) * 255).astype(np.uint8)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for i, image in enumerate(bytes_):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas[:, :, 0] if channels == 1 else canvas


def save_grid(path: Path | str, images: Any, columns: int | None = None) -> None:
    """Write images (N, C, H, W) in [0, 1], an array or a tensor on any device, as one PNG."""
    if not isinstance(images, np.ndarray):
        images = images.detach().float().cpu().numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(grid(images, columns)))
