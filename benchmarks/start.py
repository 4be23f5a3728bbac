"""How long a run takes to begin and to come back, and what a kill leaves: 2 ranks on this machine.

    python benchmarks/start.py [--rounds 5] [--json]

- first step: from the command to the end of step 1, of `train --ranks 2` and of `torchrun -m dist_train train`, each
  beside a bare script under torchrun with the same imports, network and DDP, interleaved.
- restart: from SIGKILL of a rank to the next step that was not there before, with `train --ranks 2 --max-restarts 3`.
- left over: how long any process is still there after SIGKILL of the launcher, of a rank, of torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards.write import write_shards
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OURS = [sys.executable, "-m", "dist_train", "train"]
BARE = """
import sys, time
import dist_train.ranks.preload
import torch, torch.distributed as dist
from dist_train.models.resnet import ResNet
torch.set_num_threads(1)
dist.init_process_group("gloo")
network = torch.nn.parallel.DistributedDataParallel(ResNet(depth=8, width=4, in_channels=1))
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(12, 1, 8, 8), torch.zeros(12, dtype=torch.long)
torch.nn.functional.cross_entropy(network(images), labels).backward()
optimizer.step()
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write("1")
dist.destroy_process_group()
"""


def recipe_in(folder: Path, steps: int, every: int) -> Path:
    """A ResNet-8 on 8x8 images."""
    images = (
        ("train", f"{i:04d}", {"image.npy": np.full((8, 8), i, np.uint8), "cls": i % 10})
        for i in range(240)
    )
    if not (folder / "data").exists():
        write_shards(folder / "data", "made", images, classes=list("0123456789"))
    network = {"name": "resnet", "depth": 8, "width": 4, "in_channels": 1, "num_classes": 10}
    recipe = Recipe(
        duration=f"{steps} steps",
        threads=1,
        log={"every": "1 step"},
        data={"path": str(folder / "data"), "global_batch": 24, "micro_batch": 12},
        model=network,
        objective={"name": "classification"},
        optimizer={"name": "sgd", "learning_rate": 0.01, "momentum": 0.9},
        callbacks={"checkpoint": {"every": f"{every} steps", "keep": 2}},
    )
    file = folder / f"recipe-{steps}.yaml"
    file.write_text(recipe.to_yaml())
    return file


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet)


def until(what: Callable[[], Any], limit: float = 300.0) -> float:
    """Seconds until `what` is so."""
    begun = time.perf_counter()
    while not what():
        if time.perf_counter() - begun > limit:
            raise SystemExit(f"nothing happened in {limit:g} s")
        time.sleep(0.005)
    return time.perf_counter() - begun


def first_steps(folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds to the end of step 1, by who starts the ranks."""
    recipe, bare = str(recipe_in(folder, 1, 1)), folder / "bare.py"
    bare.write_text(BARE)
    found: dict[str, list[float]] = {"bare torchrun": [], "ours": [], "ours under torchrun": []}
    for number in range(rounds):
        for name, times in found.items():
            mark = folder / f"{name.replace(' ', '-')}-{number}"
            if name == "bare torchrun":
                command, there = [*TORCHRUN, str(bare), str(mark)], mark
            else:
                command = OURS if name == "ours" else [*TORCHRUN, "-m", "dist_train", "train"]
                command = [*command, recipe, "--run-dir", str(mark)]
                command += ["--ranks", "2"] if name == "ours" else []
                there = mark / "metrics.jsonl"
            process = start(command)
            times.append(until(lambda there=there: there.exists() and there.stat().st_size))
            process.wait()
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))

    def below(one: int) -> Iterator[int]:
        yield one
        for child in parents.get(one, []):
            yield from below(child)

    return set(below(pid))


def alive(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
        except OSError:
            continue
    return found


def rank_of(run_dir: Path, rank: int) -> int:
    """The process of a rank: the parent of its watcher."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            if any(word.endswith("/watch.py") for word in words):
                place = json.loads(words[-2])
                if (place["directory"], place["rank"]) == (str(run_dir), rank):
                    return int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    raise SystemExit(f"rank {rank} of {run_dir} is not there")


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return RunDirectory(run_dir).rows()[-1]["step"] if file.exists() and file.stat().st_size else 0


def restart(folder: Path, number: int) -> float:
    """Seconds from SIGKILL of rank 1 to a step that was not there before."""
    recipe, run_dir = str(recipe_in(folder, 100_000, 5)), folder / f"restart-{number}"
    process = start(
        [*OURS, recipe, "--ranks", "2", "--max-restarts", "3", "--run-dir", str(run_dir)]
    )
    until(lambda: last_step(run_dir) > 20)
    os.kill(rank_of(run_dir, 1), signal.SIGKILL)
    time.sleep(0.1)  # rows that were on their way
    before = last_step(run_dir)
    seconds = 0.1 + until(lambda: last_step(run_dir) > before)
    process.kill()
    process.wait()
    return seconds


def left_over(folder: Path, whom: str) -> float:
    """Seconds until no process of a run is there any more, after SIGKILL of `whom`."""
    recipe, run_dir = str(recipe_in(folder, 100_000, 1000)), folder / whom.replace(" ", "-")
    command = [*OURS, recipe, "--ranks", "2", "--run-dir", str(run_dir)]
    if whom == "torchrun":
        command = [*TORCHRUN, "-m", "dist_train", "train", recipe, "--run-dir", str(run_dir)]
    process = start(command)
    until(lambda: last_step(run_dir) > 20)
    everyone = family(process.pid) | family(rank_of(run_dir, 0)) | family(rank_of(run_dir, 1))
    os.kill(rank_of(run_dir, 0) if whom == "a rank" else process.pid, signal.SIGKILL)
    seconds = until(lambda: not alive(everyone - {process.pid}) and process.poll() is not None)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        firsts = first_steps(folder, options.rounds)
        found = {
            "seconds to the first step": firsts,
            "ours over bare torchrun": round(firsts["ours"] / firsts["bare torchrun"], 2),
            "seconds from kill -9 of a rank to the next step": round(
                statistics.median(restart(folder, number) for number in range(options.rounds)), 2
            ),
            "seconds until nothing is left after kill -9": {
                whom: round(left_over(folder, whom), 2)
                for whom in ("the launcher", "a rank", "torchrun")
            },
        }
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
