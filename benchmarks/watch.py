"""What the watch sees, with 2 ranks on this machine and a ResNet-8 on 8x8 images. To be run on a quiet machine.

    python benchmarks/watch.py [--steps 500] [--json]

- false alarms: log intervals of an undisturbed run in which a rank was called late.
- late rank: from step 101 on rank 1 takes half as long again before the collective; how many steps until it is named.
- hang: rank 1 stops itself (SIGSTOP), or holds the interpreter, with a limit of 2 s; seconds from then to the report.
- beat: nanoseconds that a rank spends to note its phase.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.callbacks import Callback
from dist_train.data_shards.write import write_shards
from dist_train.heartbeat import Heartbeat
from dist_train.ranks import RankFailed
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.trainer import Trainer

LATE_FROM, HANGS_AT, LIMIT = 100, 20, 2.0


class Late(Callback):
    """Rank 1 waits half of what its steps took before their collectives so far."""

    def run_begins(self, run: Trainer) -> None:
        loss: Any = run.objective.loss

        def late(turn: Any, networks: Any, micro: Any, scalars: Any) -> Any:
            if run.world.rank == 1 and run.step >= LATE_FROM and micro is run.batch[0]:
                time.sleep(0.5 * self.usual)
            return loss(turn, networks, micro, scalars)

        run.objective.loss = late  # type: ignore[method-assign]

    def step_begins(self, run: Trainer) -> None:
        if 0 < run.step < LATE_FROM:
            spent = run.heartbeat.spent
            self.usual = sum(spent[p] for p in ("data", "forward", "backward")) / run.step


class Hangs(Callback):
    """Rank 1 hangs, and notes when."""

    def __init__(self, how: str) -> None:
        self.how = how

    def step_ends(self, run: Trainer) -> None:
        if run.world.rank == 1 and run.step == HANGS_AT:
            (run.directory.logs / "since").write_text(str(time.time()))
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            re.match("(a?){40}a{40}", "a" * 40)


def recipe_in(folder: Path, steps: int, **callbacks: Any) -> Recipe:
    images = (
        ("train", f"{i:04d}", {"image.npy": np.full((8, 8), i, np.uint8), "cls": i % 10})
        for i in range(240)
    )
    if not (folder / "data").exists():
        write_shards(folder / "data", "made", images, classes=list("0123456789"))
    network = {"name": "resnet", "depth": 8, "width": 16, "in_channels": 1, "num_classes": 10}
    return Recipe(
        duration=f"{steps} steps",
        threads=1,
        data={"path": str(folder / "data"), "global_batch": 64, "micro_batch": 32},
        model=network,
        objective={"name": "classification"},
        optimizer={"name": "sgd", "learning_rate": 0.01},
        watch={"hang_after": LIMIT if "hangs" in callbacks else 300},
        callbacks=callbacks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(recipe_in(folder, options.steps), ranks=2, run_dir=folder / "quiet")
        rows = RunDirectory(folder / "quiet").rows()
        found["false alarms"] = (
            f"{sum('straggler' in row for row in rows)} of {len(rows)} intervals"
        )
        late = {"name": "watch:Late"}
        train(recipe_in(folder, LATE_FROM + 100, late=late), ranks=2, run_dir=folder / "late")
        named = [r["step"] for r in RunDirectory(folder / "late").rows() if r.get("straggler") == 1]
        after = [step - LATE_FROM for step in named if step > LATE_FROM]
        found["steps until a late rank is named"] = after[0] if after else None
        for how in ("stopped", "holding the interpreter"):
            run_dir = folder / how.replace(" ", "-")
            hangs = {"name": "watch:Hangs", "how": how}
            try:
                train(recipe_in(folder, 100, hangs=hangs), ranks=2, run_dir=run_dir)
            except RankFailed:
                since = float((run_dir / "logs" / "since").read_text())
                seconds = (run_dir / "logs" / "hang.txt").stat().st_mtime - since
                found[f"seconds to the report, {how}, limit {LIMIT:g} s"] = round(seconds, 2)
        heart = Heartbeat()
        beat = min(timeit.repeat(lambda: heart.enter("forward"), number=100_000, repeat=5))
        found["nanoseconds a beat"] = round(beat * 1e4)
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
