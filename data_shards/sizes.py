"""Sizes as people write them."""

from __future__ import annotations

from dist_train.errors import UserError

UNITS = {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def bytes_of(size: str) -> int:
    """`"64 GiB"` in bytes."""
    number, unit = size.strip(), ""
    for known in UNITS:
        if number.endswith(known):
            number, unit = number.removesuffix(known).strip(), known
    if not number.isdecimal() or not unit or int(number) < 1:
        raise UserError(f"size '{size}': expected one like '64 GiB' ({', '.join(UNITS)})")
    return int(number) * UNITS[unit]
