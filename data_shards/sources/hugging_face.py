"""Data sets of the Hugging Face hub, of its offline cache, or saved in a folder."""

from __future__ import annotations

from typing import Any

from dist_train.errors import UserError


def load_split(name: str, split: str) -> Any:
    """One split of a data set by name, from the hub or its cache. UserError: it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("needs datasets: pip install 'dist-train[data]'") from error
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, its client and each format have exceptions of their own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"'{name}' cannot be loaded ({type(error).__name__}: {reason})") from error
