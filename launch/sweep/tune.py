"""`sweep --on ray`: Ray Tune schedules the trials, our search says which. Beside launch/ray.py the only file that knows
Ray.

To Tune a leg is a trial, its searcher is ours, and its resources are the placement group that `launch --on ray` would
make: the trial starts its ranks in it. What Tune writes about the experiment is never read again: sweep.jsonl is the
truth, and a sweep that goes on is a new experiment with what is left to do.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from dist_train.errors import UserError
from dist_train.launch.backend import Job
from dist_train.launch.ray import CANCEL, REQUEUE, bundles, exported, see_through
from dist_train.launch.spec import Spec
from dist_train.launch.sweep.conduct import End, Sweep, Task, heeded, raise_if_told
from dist_train.launch.sweep.jobs import job_of, submitted, take_code
from dist_train.launch.sweep.progress import Progress

FOLDER = "ray"
"""In the sweep's directory, which all nodes see: where Tune keeps its notes while it runs."""


def conduct(sweep: Sweep, spec: Spec, at_once: int, progress: Progress) -> None:
    """Run a sweep to its end on the Ray cluster of this machine, or of RAY_ADDRESS."""
    take_code(sweep.plan, sweep.path)
    any_job = Job(spec, "sweep", sweep.path, sweep.plan.recipe.root, sweep.path / "code")
    _connect(exported(any_job))
    resources = tune.PlacementGroupFactory([{}, *bundles(spec)], strategy="STRICT_SPREAD")
    searcher = Asked(sweep, spec, at_once, progress)
    notes = sweep.path / FOLDER
    try:
        with heeded(searcher.stop) as told:
            searcher.told = told
            tuner = tune.Tuner(
                tune.with_resources(train_leg, resources),
                tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(notes),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=spec.max_restarts),
                ),
            )
            tuner.fit()
    finally:
        ray.shutdown()
        shutil.rmtree(notes, ignore_errors=True)
    raise_if_told(told, sweep)


class Asked(Searcher):
    """Tune's view of our search: it is asked for a trial, and told when one has ended."""

    def __init__(self, sweep: Sweep, spec: Spec, at_once: int, progress: Progress) -> None:
        super().__init__()
        self.sweep, self.spec, self.at_once, self.progress = sweep, spec, at_once, progress
        self.tasks: dict[str, Task] = {}
        self.told: list[int] = []

    def suggest(self, trial_id: str) -> Any:
        """A run directory to train; None while there is none to begin yet, FINISHED at the end."""
        if not self.told and len(self.tasks) >= self.at_once:
            return None
        task = None if self.told else self.sweep.next()
        if task is None:
            return None if self.tasks else self.FINISHED
        (task.run_dir / CANCEL).unlink(missing_ok=True)
        submitted(job_of(task, self.spec, self.sweep.path), trial_id)
        self.tasks[trial_id] = task
        self.progress.began(task)
        if self.told:  # too late for the handler to find it
            self.stop(self.told[0])
        return {"run_dir": str(task.run_dir)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        task = self.tasks.pop(trial_id)
        if error or result is None:
            end = End(task, error="its Ray actor was lost", cut_off=bool(self.told))
        elif result["code"] == REQUEUE:
            end = End(task, error=result["reason"], cut_off=bool(self.told))
        elif result["code"]:
            log = task.run_dir / "logs" / "job.log"
            end = End(task, error=f"{result['reason']}; see {log}")
        else:
            end = End(task)
        if not end.cut_off:
            self.progress.ended(task, self.sweep.ended(end))
        if self.sweep.stopping and not self.told:
            self.stop(0)
            self.told.append(0)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A leg has one result, its end."""

    def stop(self, number: int) -> None:
        """Let the ranks of all trials save and end."""
        for task in list(self.tasks.values()):
            (task.run_dir / CANCEL).touch()

    def save(self, checkpoint_path: str) -> None:
        """Nothing of it need be saved, but Tune wants a file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from sweep.jsonl: dist-train sweep DIR --resume")

    def __reduce__(self) -> Any:
        """What Tune keeps of it in its notes, which nobody reads."""
        return Searcher, ()


def train_leg(config: dict[str, str]) -> None:
    """What a trial does, in the placement group that Tune has made for it: it starts its ranks, and sees to them."""
    job = Job.read(Path(config["run_dir"]))

    def say(text: str) -> None:
        with job.log.open("a") as file:
            file.write(f"ray: {text}\n")

    code, reason = see_through(job, say, ray.util.get_current_placement_group())
    tune.report({"code": code, "reason": reason})


def _connect(variables: dict[str, str]) -> None:
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours lets the trials save
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer one prints at any verbosity
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
    except ConnectionError as error:
        raise UserError(
            f"--on ray: no cluster ({str(error).splitlines()[0]}): run it on a node of one, or set RAY_ADDRESS"
        ) from None
