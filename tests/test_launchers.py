"""The same run, whoever starts its ranks: ours, torchrun, accelerate launch; and one process without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
from slurm_cluster import processes_of, wait_for

from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.testing import assert_same_run

BIN = Path(sys.executable).parent
CONFIGS = Path(__file__).parents[1] / "launch" / "accelerate_configs"
LAUNCHERS = {
    "torchrun": [
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dist_train",
    ],
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--config_file", str(CONFIGS / "zero2.yaml")),
        *("--num_processes", "2", "--main_process_port", "0", "-m", "dist_train"),
    ],
}
TOLD = {"torchrun": [], "accelerate": ["--set", "strategy=null"]}
"""What the recipe must not say, for the launcher to say it."""


def start(
    command: list[str], recipe: Path, run_dir: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    line = [*command, "train", str(recipe), "--run-dir", str(run_dir), *more]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=240, env=environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def ours(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe file, and the run that our own ranks made of it."""
    folder = tmp_path_factory.mktemp("launchers")
    recipe = folder / "tiny.yaml"
    plan = cases.tiny_recipe("wgan_gp", tiny_data, strategy="zero2", duration="6 steps")
    recipe.write_text(plan.set("callbacks.trace", {"name": "dist_train.testing:Trace"}).to_yaml())
    train(Recipe.load(recipe), run_dir=folder / "ours", ranks=2)
    return recipe, folder / "ours"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_make_the_same_run(
    ours: tuple[Path, Path], tmp_path: Path, launcher: str
) -> None:
    recipe, run = ours
    done = start(LAUNCHERS[launcher], recipe, tmp_path / launcher, *TOLD[launcher])
    assert done.returncode == 0, done.stderr
    assert_same_run(run, tmp_path / launcher)


def test_accelerate_with_fsdp_is_fsdp2(ours: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = ours
    plan = Recipe.load(recipe, ["strategy=fsdp2", "duration=4 steps"])
    train(plan, run_dir=tmp_path / "ours", ranks=2)
    config = str(CONFIGS / "fsdp2.yaml")
    command = [config if part.endswith(".yaml") else part for part in LAUNCHERS["accelerate"]]
    more = ("--set", "strategy=null", "--set", "duration=4 steps")
    done = start(command, recipe, tmp_path / "theirs", *more)
    assert done.returncode == 0, done.stderr
    assert Recipe.load(tmp_path / "theirs").strategies["critic"] == {"name": "fsdp2"}
    assert_same_run(tmp_path / "ours", tmp_path / "theirs")


def test_launch_on_accelerate_makes_the_same_run(ours: tuple[Path, Path], tmp_path: Path) -> None:
    """In the background; the command only looks on."""
    recipe, run = ours
    words = ["launch", str(recipe), "--on", "accelerate", "--ranks-per-node", "2", "--follow"]
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *words, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(run, tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="by the parent-death signal of Linux")
def test_no_rank_outlives_torchrun(ours: tuple[Path, Path], tmp_path: Path) -> None:
    """torchrun itself leaves its ranks, when it is killed."""
    words = [str(ours[0]), "--run-dir", str(tmp_path / "run"), "--set", "duration=100000 steps"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen([*LAUNCHERS["torchrun"], "train", *words], env=environ)
    run_dir = tmp_path / "run"
    try:
        wait_for((run_dir / "metrics.jsonl").exists, "a first row")
        assert len(processes_of(run_dir)) >= 3
    finally:
        torchrun.kill()
        torchrun.wait()
    wait_for(lambda: not processes_of(run_dir), "the end of all ranks", 30)


def test_a_script_needs_no_main_guard() -> None:
    """Ranks do not run the user's script again: it may even come from standard input."""
    script = "from os import getpid\nfrom dist_train.ranks import start_ranks\nprint(len(start_ranks(2, getpid)))\n"
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
