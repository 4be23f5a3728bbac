"""A real Slurm of two nodes: whatever ends a job early, the run goes on, to the same bits as the unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
from slurm_cluster import Cluster, missing, processes_of, wait_for

from dist_train.callbacks.wandb import history
from dist_train.launch import jobs
from dist_train.launch.backend import Job
from dist_train.launch.cli import main
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run

RAY = Path(__file__).parents[1] / "slurm" / "ray.sbatch"
GATE = '''
import os, time
from dist_train.callbacks import Callback

class Gate(Callback):
    """In a job, wait after step 8 until the test opens the gate, or a signal does."""

    def step_ends(self, run):
        path = run.directory.path
        if run.step == 8 and "SLURM_JOB_ID" in os.environ:
            (path / "at-the-gate").touch()
            while not ((path / "open").exists() or run.interruption.reason):
                time.sleep(0.05)
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why = missing()
    if why and "slurm" not in os.environ.get("DIST_TRAIN_TESTS_MUST_HAVE", ""):
        pytest.skip(f"no Slurm here: {why}")
    assert not why
    with (
        Cluster(tmp_path_factory.mktemp("slurm") / "cluster").running() as one,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PATH", one.environ["PATH"])
        patch.setenv("SLURM_CONF", one.environ["SLURM_CONF"])
        yield one


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """12 steps, a checkpoint each 6, with a callback of the user's own project."""
    project = tmp_path_factory.mktemp("project")
    (project / "gated.py").write_text(GATE)
    plan = cases.tiny_recipe("resnet", tiny_data, duration="12 steps").set("log.every", "1 step")
    plan = plan.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    return Recipe.restore(
        plan.set("callbacks.gate", {"name": "gated:Gate"}).as_dict(), "tiny", project
    )


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(
        train(recipe, run_dir=tmp_path_factory.mktemp("unbroken") / "run", ranks=2)["run_dir"]
    )


def launch(recipe: Recipe, run_dir: Path, **flags: object) -> Job:
    """Two nodes, a rank each, if not asked otherwise."""
    settings = {"on": "slurm", "nodes": 2, "env": ["SLURM_CONF"], "notice": 60} | flags
    prepared = jobs.prepare(recipe, settings, run_dir)
    prepared.submit()
    return prepared.job


def at_the_gate(job: Job) -> None:
    wait_for(lambda: (job.run_dir / "at-the-gate").exists(), _told(job))


def ended(cluster: Cluster, job: Job, state: str = "COMPLETED") -> None:
    def over() -> bool:
        return cluster.state(job.id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    wait_for(over, _told(job))
    assert cluster.state(job.id) == state, _told(job)


def _told(job: Job) -> str:
    return job.log.read_text() if job.log.exists() else "no output"


def assert_as_unbroken(unbroken: Path, run_dir: Path) -> None:
    """The same bits, one row a step, and nobody left over."""
    assert_same_run(unbroken, run_dir)
    assert [row["step"] for row in RunDirectory(run_dir).rows()] == list(range(1, 13))
    wait_for(lambda: not processes_of(run_dir), "the last process's end", 10)


def test_two_nodes_under_zero_2(
    cluster: Cluster, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: a path that needs quoting, and a secret that travels without being written anywhere."""
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    zero = recipe.set("strategy", "zero2")
    whole = Path(train(zero, run_dir=tmp_path / "whole", ranks=2)["run_dir"])
    job = launch(zero.set("callbacks.gate", None), tmp_path / "to quote: 100% $HOME")
    ended(cluster, job)
    assert_as_unbroken(whole, job.run_dir)
    status = jobs.statuses(str(job.run_dir))[job.run_dir.name]
    assert status["state"] == "done"
    for file in job.run_dir.rglob("*"):
        assert not file.is_file() or b"canary" not in file.read_bytes(), file


def test_scancel_saves_and_the_run_can_go_on(
    cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path
) -> None:
    job = launch(recipe, tmp_path / "run")
    at_the_gate(job)
    jobs.cancel(str(job.run_dir))
    ended(cluster, job, "CANCELLED")
    wait_for(lambda: not processes_of(job.run_dir), "its end", 30)
    assert (job.run_dir / "checkpoints" / "step-00000008").is_dir(), _told(job)
    assert jobs.statuses(str(job.run_dir))["run"]["state"] == "cancelled"
    (job.run_dir / "open").touch()
    ended(cluster, launch(recipe, job.run_dir))
    assert_as_unbroken(unbroken, job.run_dir)


@pytest.mark.soak  # Slurm does the same after a preemption
def test_requeue(cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path) -> None:
    job = launch(recipe, tmp_path / "run")
    at_the_gate(job)
    cluster.ask("scontrol", "requeue", job.id)
    (job.run_dir / "open").touch()
    ended(cluster, job)
    assert_as_unbroken(unbroken, job.run_dir)


def test_preemption(cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path) -> None:
    """By a job of a partition that may take the nodes; Slurm requeues, and nobody else does. One run in W&B."""
    job = launch(recipe.set("callbacks.wandb", {"mode": "offline"}), tmp_path / "run")
    at_the_gate(job)
    other = cluster.ask(
        *("sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "true"),
    )
    wait_for(lambda: cluster.state(other.strip()) == "COMPLETED", "the other job")
    (job.run_dir / "open").touch()
    ended(cluster, job)
    assert_as_unbroken(unbroken, job.run_dir)
    assert [row["step"] for row in history(job.run_dir / "wandb")] == list(range(1, 13))
    assert (
        len(cluster.ask("squeue", "-h", "-t", "all", "-n", "resnet", "-o", "%i %T %r").split()) > 0
    )


@pytest.mark.soak  # a preemption sends the same signals
def test_time_limit(cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path) -> None:
    """The signal before the limit: saved there, and back in the queue once by our own hand."""
    job = launch(recipe, tmp_path / "run")
    at_the_gate(job)
    cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
    wait_for(lambda: cluster.state(job.id) == "PENDING", _told(job))
    assert (job.run_dir / "checkpoints" / "step-00000008").is_dir(), _told(job)
    cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    (job.run_dir / "open").touch()
    ended(cluster, job)
    assert_as_unbroken(unbroken, job.run_dir)
    assert "Restarts=1 " in cluster.ask("scontrol", "show", "job", "-o", job.id)


@pytest.mark.soak  # Ray loses a node in `make test`
def test_node_crash(cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path) -> None:
    job = launch(recipe, tmp_path / "run")
    at_the_gate(job)
    cluster.crash("n2")
    (job.run_dir / "open").touch()
    wait_for(lambda: cluster.state(job.id) != "RUNNING", "the crash to be noticed")
    cluster.start("n2")
    ended(cluster, job)
    assert_as_unbroken(unbroken, job.run_dir)


@pytest.mark.soak
def test_a_node_is_back_before_it_was_missed(
    cluster: Cluster, recipe: Recipe, unbroken: Path, tmp_path: Path
) -> None:
    """It knows nothing of its task, so that the step never ends, and another could not start beside it."""
    job = launch(recipe, tmp_path / "run")
    at_the_gate(job)
    cluster.crash("n2")
    (job.run_dir / "open").touch()
    cluster.start("n2")
    ended(cluster, job)
    assert_as_unbroken(unbroken, job.run_dir)
    assert "its node may be down" in job.log.read_text()


def test_array(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Two members that differ by their seed, one process each."""
    plain = recipe.set("callbacks.gate", None)
    job = launch(plain, tmp_path / "run", nodes=1, array="0-1")

    def over() -> bool:
        return jobs.statuses(str(job.run_dir))["run"]["state"] in jobs.ENDED

    wait_for(over, "the members' end")
    assert jobs.statuses(str(job.run_dir))["run"]["state"] == "done"
    told = "".join(jobs.output(str(job.run_dir), until_end=False))
    assert all(str(job.member(number)) in told for number in range(2)), told
    for number in range(2):
        member = plain.set("seed", plain.seed + number)
        whole = train(member, run_dir=tmp_path / f"whole-{number}")["run_dir"]
        assert_as_unbroken(Path(whole), job.member(number))


def test_doctor_tests_the_nodes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--on", "slurm", "--nodes", "2", "--seconds", "1", "--json"]
    code = main(["doctor", *words])
    found = json.loads(capfd.readouterr().out)
    assert [rank["host"] for rank in found["ranks"]] == ["n1", "n2"]
    assert code == (1 if found["bad"] else 0)  # on a busy machine one of the two may be slow
    assert list(tmp_path.iterdir()) == []


def test_doctor_does_not_wait_for_nodes_that_do_not_come(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--on", "slurm", "--nodes", "3"]) == 2
    [told] = capfd.readouterr().err.splitlines()
    assert "Requested node configuration is not available" in told
    other = cluster.ask(
        *("sbatch", "--parsable", "-N", "2", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "sleep 600"),
    )
    assert main(["doctor", "--on", "slurm", "--nodes", "2", "--within", "1"]) == 2
    cluster.ask("scancel", other.strip())
    assert "has not given them within 1 s (Resources)" in capfd.readouterr().err
    assert "dist-train-smoke" not in cluster.ask("squeue", "-h", "-o", "%j")


@pytest.mark.soak
def test_a_ray_cluster_inside_an_allocation(
    cluster: Cluster, recipe: Recipe, tmp_path: Path
) -> None:
    """On one node: Ray refuses to form a cluster of several on loopback, where these two are."""
    if " " in sys.executable:
        pytest.skip("Ray cannot start workers from a path with a space")
    file, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(recipe.set("callbacks.gate", None).to_yaml())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = cluster.ask(
        *("env", f"PATH={path}", "sbatch", "--parsable", "--nodes=1", "--cpus-per-task=1"),
        *(f"--output={tmp_path / 'out'}", str(RAY), str(run_dir), str(file)),
    ).strip()
    wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "the job's end", 200)
    told = (tmp_path / "out").read_text()
    assert cluster.state(job) == "COMPLETED", told
    assert RunDirectory(run_dir).rows()[-1]["step"] == 12
    assert "RAY_AUTH_TOKEN" not in told
    wait_for(lambda: not processes_of(run_dir), "the last process's end", 10)


def test_a_sweep_whose_trials_are_jobs(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Of two nodes each. The sweep is killed while the first runs, which goes on, and the next start finds it."""
    path, rate = tmp_path / "sweep", "optimizer.learning_rate"
    plan = recipe.set("launch", {"nodes": 2, "env": ["SLURM_CONF"], "notice": 60})
    plan = plan.set("evaluate", {"split": "test", "every": "6 steps", "metrics": ["loss"]})
    space = {
        "search": "grid",
        "objective": {"metric": "loss", "mode": "min"},
        "space": {rate: [0.1, 0.03]},
    }
    (recipe.root / "swept.yaml").write_text(plan.to_yaml())
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    command = ["sweep", str(recipe.root / "swept.yaml"), "--space", str(tmp_path / "space.yaml")]
    command += ["--on", "slurm", "--at-once", "1", "--run-dir", str(path)]
    process = subprocess.Popen([sys.executable, "-m", "dist_train", *command])
    wait_for(lambda: list(path.glob("trials/0000-*/at-the-gate")), "the first at the gate")
    [first] = path.glob("trials/*")
    job = Job.read(first).id
    process.kill()
    process.wait()

    def open_the_gates() -> None:
        wait_for(lambda: list(path.glob("lock")), "the next start")
        (first / "open").touch()
        wait_for(lambda: list(path.glob("trials/0001-*/at-the-gate")), "the second at the gate")
        [second] = path.glob("trials/0001-*")
        (second / "open").touch()

    thread = threading.Thread(target=open_the_gates)
    thread.start()
    assert main(["sweep", str(path), "--on", "slurm", "--at-once", "1", "--resume", "--json"]) == 0
    thread.join()
    runs = sorted(path.glob("trials/*"))
    assert Job.read(first).id == job, "submitted a second time"
    rows = [json.loads(line) for line in (path / "sweep.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows if row["event"] == "ended"] == ["done"] * 2
    for run in runs:
        whole = plan.set(rate, Recipe.load(run).optimizer["learning_rate"]).set("launch", None)
        train(whole, run_dir=tmp_path / f"whole-{run.name}", ranks=2)
        assert_same_run(tmp_path / f"whole-{run.name}", run)
        assert [row["step"] for row in RunDirectory(run).rows()] == list(range(1, 13))
