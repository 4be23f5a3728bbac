"""`sweep --on local`: trials in processes that fork from the server that has imported torch once."""

from __future__ import annotations

import os
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dist_train.errors import Interrupted
from dist_train.launch.sweep.conduct import LOG, End, Place, Task
from dist_train.ranks import RankFailed, Ranks, warm_up


class Local(Place):
    """Trials of this machine, each of so many ranks; a trial that fails, or hangs, takes no other with it.

    Args:
        at_once: how many run side by side, and so among how many the GPUs of this machine are shared out.
    """

    def __init__(self, ranks: int, at_once: int) -> None:
        warm_up()
        self.ranks, self.at_once = ranks, at_once
        self._running: dict[int, tuple[Task, Ranks]] = {}  # by the place among those side by side

    @property
    def tasks(self) -> list[Task]:
        return [task for task, _ in self._running.values()]

    def start(self, task: Task) -> None:
        slot = next(n for n in range(self.at_once) if n not in self._running)
        arguments = (
            *(task.recipe.as_dict(), task.recipe.source, task.recipe.root),
            *(str(task.run_dir), task.until),
        )
        environ = gpus_of(slot, self.ranks * task.recipe.devices, visible_gpus())
        ranks = Ranks(self.ranks, train_trial, *arguments, environ=environ)
        self._running[slot] = task, ranks
        ranks.start()

    def ended(self) -> list[End]:
        slots = {s: slot for slot, (_, ranks) in self._running.items() for s in ranks.running}
        found = []
        for sentinel in wait(list(slots), timeout=1.0):
            slot = slots[sentinel]  # type: ignore[index]
            if slot in self._running:  # else another rank of it has failed
                found += self._noted(slot, sentinel)
        return found

    def stop(self, number: int) -> None:
        for _, ranks in list(self._running.values()):
            ranks.send(number)

    def close(self) -> None:
        for _, ranks in self._running.values():
            ranks.end()
        self._running.clear()

    def _noted(self, slot: int, sentinel: Any) -> list[End]:
        """What became of a trial, of which a rank has ended; nothing while others run."""
        task, ranks = self._running[slot]
        try:
            ranks.ended(sentinel)
            if ranks.running:
                return []
            ranks.results()
            end = End(task)
        except (Interrupted, KeyboardInterrupt) as error:
            told = bool(ranks.told)  # by us; else by somebody else, and nobody will go on with it
            end = End(task, error="" if told else str(error), cut_off=told)
        except (RankFailed, ValueError) as error:
            end = End(task, error=str(error))
        ranks.end()
        del self._running[slot]
        return [end]


def train_trial(
    settings: dict[str, Any], source: str, root: Path, run_dir: str, until: str | None
) -> dict[str, Any]:
    """What each rank of a trial does. It prints into the trial's own log."""
    from dist_train.recipe import Recipe
    from dist_train.run import train

    log = os.open(Path(run_dir) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    recipe = Recipe.restore(settings, source, root)
    return train(recipe, run_dir=run_dir, resume="auto", until=until)


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    with suppress(OSError):
        return [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return []


def gpus_of(slot: int, count: int, gpus: list[str]) -> dict[str, str]:
    """The variables by which the trial in a slot sees its own GPUs, in turn where there are too few."""
    if not gpus:
        return {}
    count = min(count, len(gpus))
    chosen = [gpus[(slot * count + n) % len(gpus)] for n in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
