"""A project outside the tree, with its own network, objective, metric and callback: by command line and from Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = [sys.executable, "-m", "dist_train", "train"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_project"


@pytest.fixture
def environ(tmp_path):
    """Data are packed under the test's folder, and nothing but the recipe's root makes the project importable."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"DIST_TRAIN_DATA": str(tmp_path / "data"), "PYTHONDONTWRITEBYTECODE": "1"}


def test_two_sharded_ranks_by_the_command_line(tmp_path, environ):
    settings = [
        "duration=30 steps",
        "strategy=zero2",
        "threads=1",
        "callbacks.filters.every=10 steps",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [*TRAIN, EXAMPLE / "digits.yaml", "--ranks", "2", "--run-dir", "run", "--json", *arguments],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 30
    top_two = result["results"]["evaluate/own_project.metrics:top_two"]
    assert result["results"]["evaluate/accuracy"] < top_two <= 1
    assert top_two > 0.5  # chance: 0.2
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    images = {row["step"]: row["images"]["filters"] for row in rows if "images" in row}
    assert list(images) == [10, 20, 30]
    for name in images.values():
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_its_own_tests_train_it_from_python(environ):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=EXAMPLE,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
