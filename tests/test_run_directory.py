"""The run directory: nothing overwritten, nothing torn, nobody else's, and no secret in it."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import run_directory
from dist_train.errors import UserError
from dist_train.run_directory import RunDirectory


def steps(directory: RunDirectory) -> list[int]:
    return [row["step"] for row in directory.rows()]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "vision", "resnet")


def test_a_new_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    made = [RunDirectory.create(tmp_path, "vision", "resnet") for _ in range(20)]
    assert len({d.path for d in made}) == 20
    assert all(d.path.parent == tmp_path / "vision" for d in made)
    assert all(len(d.path.name) == len("resnet-") + 6 for d in made)
    assert made[0].checkpoints.is_dir() and made[0].logs.is_dir()


def test_a_taken_id_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter("aaaaaa" + "aaaaaa" + "bbbbbb")
    monkeypatch.setattr(run_directory.secrets, "choice", lambda _: next(letters))
    assert RunDirectory.create(tmp_path, "p", "n").path.name == "n-aaaaaa"
    assert RunDirectory.create(tmp_path, "p", "n").path.name == "n-bbbbbb"


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\nb", "x" * 300])
def test_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        RunDirectory.create(tmp_path, "vision", name)


def test_an_exact_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDirectory.create_at(tmp_path / "empty").write_recipe("name: x\n")
    assert RunDirectory.open(tmp_path / "empty").recipe.read_text() == "name: x\n"
    with pytest.raises(UserError, match="exists already"):
        RunDirectory.create_at(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        RunDirectory.open(tmp_path)


def test_rows_come_back_as_written(directory: RunDirectory) -> None:
    assert directory.rows() == []
    directory.append_row({"step": 10, "loss": 0.1 + 0.2, "images": {"grid": "samples/grid.png"}})
    directory.append_row({"step": 20, "loss": math.nan, "a": -math.inf})
    assert directory.rows() == [
        {"step": 10, "loss": 0.1 + 0.2, "images": {"grid": "samples/grid.png"}},
        {"step": 20, "loss": None, "loss/nonfinite": "nan", "a": None, "a/nonfinite": "-inf"},
    ]
    assert b"NaN" not in directory.metrics.read_bytes()


def test_cut_keeps_the_bytes_up_to_the_step(directory: RunDirectory) -> None:
    for step in range(10, 60, 10):
        directory.append_row({"step": step, "loss": 1 / step})
    whole = directory.metrics.read_bytes()
    directory.cut(30)
    assert steps(directory) == [10, 20, 30]
    directory.append_row({"step": 40, "loss": 1 / 40})
    directory.append_row({"step": 50, "loss": 1 / 50})
    assert directory.metrics.read_bytes() == whole
    directory.cut(0)
    assert directory.metrics.read_bytes() == b""
    assert not list(directory.path.glob(".metrics*"))


@pytest.mark.parametrize("length", range(0, 24))
def test_a_torn_last_line_is_no_row(directory: RunDirectory, length: int) -> None:
    directory.append_row({"step": 10, "loss": 0.5})
    with directory.metrics.open("ab") as file:
        file.write(b'{"step":20,"loss":0.25}\n'[:length])
    assert steps(directory) == [10]
    RunDirectory(directory.path).append_row({"step": 20, "loss": 0.25})
    assert steps(directory) == [10, 20]


def test_a_damaged_line_is_named(directory: RunDirectory) -> None:
    directory.metrics.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        directory.rows()


WRITER = """
import os, sys
from pathlib import Path
from dist_train.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.lock()
step = 0
while True:
    step += 1
    directory.append_row({"step": step, "text": "x" * 50})
    if step == 100:
        print("locked", flush=True)
"""


def test_a_killed_writer_leaves_whole_rows_and_no_lock(directory: RunDirectory) -> None:
    directory.write_recipe("")
    command = [sys.executable, "-c", WRITER, str(directory.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {writer.pid} on"):
            directory.lock()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    directory.lock()
    with pytest.raises(UserError, match="this very process"):
        RunDirectory.open(directory.path).lock()
    directory.unlock()
    assert steps(directory) == list(range(1, len(directory.rows()) + 1))
    RunDirectory.open(directory.path).lock()


def test_every_start_leaves_its_command(directory: RunDirectory) -> None:
    directory.write_command(
        ["dist-train", "train", "a b", "--set", "callbacks.wandb.api_key=hunter2hunter2"]
    )
    directory.write_command(
        ["dist-train", "--password", "hunter2", "s3://me:hunter2@host/x", "max_tokens=5"]
    )
    first, second = directory.command.read_text().splitlines()
    assert shlex.split(first)[2:] == ["a b", "--set", "callbacks.wandb.api_key=***"]
    assert shlex.split(second)[1:] == ["--password", "***", "s3://***@host/x", "max_tokens=5"]


def test_environment_says_what_changed(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("NCCL_SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = run_directory.environment(threads=2, folder=directory.path)
    assert found["packages"]["torch"] and found["device"] == "cpu"
    assert found["variables"]["OMP_NUM_THREADS"] == "2"
    assert directory.environment_changes(found) == []
    directory.write_environment(found)
    text = directory.environment.read_text()
    assert "0123456789abcdef" not in text and "hunter2" not in text
    assert directory.environment_changes(found) == []
    moved = {**found, "world_size": 4, "packages": {**found["packages"], "torch": "9.9"}}
    assert directory.environment_changes(moved) == [
        "ranks 1 -> 4",
        f"torch {found['packages']['torch']} -> 9.9",
    ]
    directory.write_environment(moved)
    again = json.loads(directory.environment.read_text())
    assert again["world_size"] == 4 and again["earlier"][0]["world_size"] == 1


def test_git_state_holds_commit_and_scrubbed_diff(tmp_path: Path) -> None:
    assert run_directory.git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert run_directory.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("x = 2\ntoken = tokens[0]\npassword = 'hunter22'\n")
    (tmp_path / "untracked").write_text("hunter23")
    state = run_directory.git_state(tmp_path)
    assert state is not None and state["dirty"]
    assert "+x = 2" in state["diff"] and "token = tokens[0]" in state["diff"]
    assert "hunter2" not in state["diff"]


def test_scrub_keeps_what_is_no_secret() -> None:
    recipe = {
        "model": {"num_tokens": 5, "pad_token": 0, "name": "tokenizer"},
        "hub": {"token": "abc", "keys": "x"},
    }
    assert run_directory.scrub(recipe) == {
        "model": {"num_tokens": 5, "pad_token": 0, "name": "tokenizer"},
        "hub": {"token": "***", "keys": "x"},
    }
    assert run_directory.scrub_text("use hf_abcdefghijklmnop now") == "use *** now"
