"""Tiny real data for every test, packed once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks import the cases that tests hand to them

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("DIST_TRAIN_TIMEOUT", "30")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `digits` (8x8 images) and `text` (pieces of 2 to 33 bytes) as shards."""
    from cases import pack_tiny_data

    folder = tmp_path_factory.mktemp("data")
    pack_tiny_data(folder)
    return folder
