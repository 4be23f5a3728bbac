"""Sweeps on this machine: trials are ordinary runs, and what is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cases
import pytest

from dist_train import amendments, checkpoint
from dist_train.errors import CheckpointError, Interrupted, UserError
from dist_train.launch.cli import main
from dist_train.launch.sweep import sweep
from dist_train.launch.sweep.conduct import raise_if_told
from dist_train.launch.sweep.local import gpus_of
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, tiny_run

RATE = "optimizer.learning_rate"
SPACE = {"search": "grid", "space": {RATE: [0.3, 0.1], "seed": [7, 8]}}


@pytest.fixture
def recipe(tiny_data: Path) -> Recipe:
    """Softmax regression on 24 steps, evaluated and saved each 8."""
    plan = cases.tiny_recipe("resnet", tiny_data, duration="24 steps", strategy="single")
    plan = plan.set(
        "model", {"name": "mlp", "depth": 0, "in_features": "auto", "num_outputs": "auto"}
    )
    plan = plan.set("data.transforms", None).set("callbacks.ema", None)
    plan = plan.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    plan = plan.set("callbacks.checkpoint.every", "8 steps").set("log.every", "1 step")
    return plan.set(
        "evaluate",
        {
            "split": "test",
            "every": "8 steps",
            "metrics": ["loss", "accuracy"],
            "best": "loss",
            "mode": "min",
        },
    )


def rows(path: Path | str, event: str = "") -> list[dict[str, Any]]:
    lines = (Path(path) / "sweep.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if event in ("", row["event"])]


def told(path: Path | str) -> list[tuple[Any, ...]]:
    """What happened, without when and how long."""
    kept = ("event", "trial", "leg", "values", "share", "donor", "state", "value", "step")
    return sorted(tuple(str(row.get(key)) for key in kept) for row in rows(path))


def losses(run_dir: Path) -> dict[int, float]:
    """The evaluations of a run by step."""
    found = RunDirectory(run_dir).rows()
    return {row["step"]: row["evaluate/loss"] for row in found if "evaluate/loss" in row}


def test_a_trial_is_the_run_that_train_makes(recipe: Recipe, tmp_path: Path) -> None:
    """Also: the best is that, its recipe trains to the same bits, the report shows all, wandb runs share a group."""
    tracked = recipe.set("callbacks.wandb", {"mode": "disabled"})
    found = sweep(tracked, SPACE, run_dir=tmp_path / "sweep", at_once=2)
    assert (found["trials"], found["failed"], found["diverged"], found["stopped"]) == (4, 0, 0, "")
    runs = {row["trial"]: tmp_path / "sweep" / row["run"] for row in rows(found["sweep"], "begun")}
    values = {row["trial"]: row["values"] for row in rows(found["sweep"], "begun")}
    assert [values[n] for n in range(4)] == [
        {RATE: rate, "seed": seed} for rate in (0.3, 0.1) for seed in (7, 8)
    ]
    ends = {row["trial"]: row["value"] for row in rows(found["sweep"], "ended")}
    assert ends == {number: min(losses(run).values()) for number, run in runs.items()}
    least = min(ends, key=lambda number: ends[number])
    assert found["best"] == {
        "trial": least,
        "loss": ends[least],
        "values": values[least],
        "run_dir": str(runs[least]),
    }
    again = train(found["recipe"], run_dir=tmp_path / "again")
    assert_same_run(again["run_dir"], runs[least])
    assert (Path(again["run_dir"]) / "recipe.yaml").read_text().count("group") == 0
    groups = {Recipe.load(run).callbacks["wandb"]["group"] for run in runs.values()}
    assert groups == {"sweep"}
    page = Path(found["report"]).read_text()
    assert main(["report", found["sweep"], "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page
    assert all(f"{value:.5g}" in page for value in ends.values())
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


def test_asha_goes_on_from_the_checkpoint_of_the_rung(recipe: Recipe, tmp_path: Path) -> None:
    """A trial that comes to the last rung is the unbroken run, bit for bit; the others stop where they were left."""
    search = {"name": "asha", "trials": 5, "factor": 2, "rungs": 3}
    space = {RATE: {"log_uniform": [1e-3, 1.0]}}
    found = sweep(recipe, {"search": search, "space": space}, run_dir=tmp_path / "sweep")
    begun = rows(found["sweep"], "begun")
    last = {row["trial"]: row for row in begun}
    steps = {"1/4": 6, "1/2": 12, "1": 24}
    assert {row["share"] for row in last.values()} == set(steps)
    for row in last.values():
        run = tmp_path / "sweep" / row["run"]
        assert [r["step"] for r in RunDirectory(run).rows()] == list(
            range(1, steps[row["share"]] + 1)
        )
    whole = next(row for row in last.values() if row["share"] == "1")
    tiny_run(
        recipe, tmp_path / "unbroken", steps=24, optimizer__learning_rate=whole["values"][RATE]
    )
    assert_same_run(tmp_path / "unbroken", tmp_path / "sweep" / whole["run"])
    assert found["best"]["trial"] in {n for n, row in last.items() if row["share"] == "1"}


def test_population_takes_checkpoints_over_and_says_so(recipe: Recipe, tmp_path: Path) -> None:
    """A member that took another's checkpoint goes on as that member would have with the new settings."""
    search = {"name": "population", "population": 3, "generations": 3}
    space = {RATE: {"log_uniform": [1e-4, 1.0]}}
    found = sweep(recipe, {"search": search, "space": space}, run_dir=tmp_path / "sweep", at_once=2)
    begun = rows(found["sweep"], "begun")
    runs = {row["trial"]: tmp_path / "sweep" / row["run"] for row in begun}
    took = [row for row in begun if row["donor"] is not None]
    assert [row["leg"] for row in took] == [1, 2]
    for row in took:
        made = amendments.read(runs[row["trial"]])
        amendment = made[[r["leg"] for r in took if r["trial"] == row["trial"]].index(row["leg"])]
        assert amendment["step"] == 8 * row["leg"]
        assert amendment["set"] == row["values"]
        assert f"{runs[row['donor']]}/legs/0{row['leg'] - 1}/step-" in amendment["weights_from"]
    first = took[0]
    twin = tmp_path / "twin"
    tiny_run(
        recipe,
        twin,
        steps=24,
        until=8,
        optimizer__learning_rate=begun[first["donor"]]["values"][RATE],
    )
    amendments.amend(twin, first["values"], reason="as the member did")
    train(Recipe.load(twin), run_dir=twin, resume="auto", until=16)
    member = RunDirectory(runs[first["trial"]]).rows()
    expected = RunDirectory(twin).rows()
    assert [r["loss"] for r in member[8:16]] == [r["loss"] for r in expected[8:16]]
    assert [r["learning_rate"] for r in member[8:16]] == [
        r["learning_rate"] for r in expected[8:16]
    ]


def test_an_amendment_is_made_once(recipe: Recipe, tmp_path: Path) -> None:
    run = tiny_run(recipe, tmp_path / "run", steps=24, until=8)
    other = tiny_run(recipe, tmp_path / "other", steps=24, until=8, seed=9)
    taken = checkpoint.resolve(other)
    for _ in range(2):
        amendments.amend(run, {RATE: 0.5, "optimizer.momentum": None}, taken=taken, reason="why")
    assert amendments.read(run) == [
        {
            "step": 8,
            "set": {RATE: 0.5, "optimizer.momentum": None},
            "weights_from": str(taken),
            "reason": "why",
            "was": {RATE: 0.01, "optimizer.momentum": 0.9},
        }
    ]
    assert Recipe.load(run).optimizer == {"name": "sgd", "learning_rate": 0.5, "weight_decay": 5e-4}
    assert checkpoint.weights_digest(run) == checkpoint.weights_digest(other)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        amendments.amend(run, {}, taken=tmp_path, reason="no checkpoint")


def test_failures_are_recorded_and_divergence_is_the_worst(recipe: Recipe, tmp_path: Path) -> None:
    space = {"search": "grid", "space": {RATE: [0.1, -1]}}
    with pytest.raises(UserError, match="learning rate"):  # known before anything runs
        sweep(recipe, space, run_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    broken = recipe.set("callbacks.fails", {"name": "cases:FailsAt", "step": 100})
    space = {"search": "grid", "space": {RATE: [1e38, 0.1], "callbacks.fails.step": [100, 5]}}
    found = sweep(broken, space, run_dir=tmp_path / "sweep")
    states = {row["trial"]: row["state"] for row in rows(found["sweep"], "ended")}
    assert states == {0: "diverged", 1: "diverged", 2: "done", 3: "failed"}
    assert found["best"]["trial"] == 2
    errors = {row["trial"]: row["error"] for row in rows(found["sweep"], "ended")}
    assert "not finite" in errors[0]
    assert "told to fail at step 5" in errors[3]
    sizes = {"data.micro_batch": [4, 6], "data.global_batch": [24, 32]}  # 6 does not divide 32
    limited = {"search": "grid", "max_failures": 0, "space": sizes}
    found = sweep(recipe, limited, run_dir=tmp_path / "limited")
    assert found["trials"] == 4
    assert "1 trials failed, expected at most max_failures 0" in found["stopped"]
    assert "micro_batch" in rows(found["sweep"], "ended")[-1]["error"]


def test_trials_of_two_ranks_under_zero(recipe: Recipe, tmp_path: Path) -> None:
    sharded = recipe.set("strategy", "zero1")
    found = sweep(
        sharded,
        {"search": "grid", "space": {RATE: [0.1, 0.3]}},
        run_dir=tmp_path / "sweep",
        ranks=2,
    )
    train(sharded.set(RATE, 0.3), run_dir=tmp_path / "alone", ranks=2)
    run = rows(found["sweep"], "begun")[1]["run"]
    assert_same_run(tmp_path / "alone", tmp_path / "sweep" / run)
    assert (
        json.loads((tmp_path / "sweep" / run / "environment.json").read_text())["world_size"] == 2
    )


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and told to end


def started(
    recipe: Recipe, path: Path, space: Mapping[str, Any], *words: str
) -> subprocess.Popen[str]:
    (path.parent / "recipe-of-it.yaml").write_text(recipe.to_yaml())
    (path.parent / "space.yaml").write_text(json.dumps(space))
    command = [sys.executable, "-m", "dist_train", "sweep", str(path.parent / "recipe-of-it.yaml")]
    command += ["--space", str(path.parent / "space.yaml"), "--run-dir", str(path), *words]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(true: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def processes_of(path: Path) -> list[int]:
    """Other processes that have a file below a folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(path) in os.readlink(link) and int(link.parts[2]) != os.getpid():
                found.append(int(link.parts[2]))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("search", "at_once", "shown"),
    [
        ("grid", 1, 4),  # all of them: the order does not matter
        ({"name": "random", "trials": 20}, 1, 10),
        ({"name": "bayesian", "trials": 20}, 2, 2),  # what comes next depends on how these end
    ],
)
def test_a_dry_run_shows_what_would_begin(
    recipe: Recipe, tmp_path: Path, capsys: Any, search: Any, at_once: int, shown: int
) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "space.yaml").write_text(json.dumps({**SPACE, "search": search}))
    words = ["sweep", str(tmp_path / "recipe.yaml"), "--space", str(tmp_path / "space.yaml")]
    words += ["--dry-run", "--at-once", str(at_once), "--run-dir", str(tmp_path / "sweep")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["first"]) == shown and not (tmp_path / "sweep").exists()
    if search == "grid":
        values = [{RATE: rate, "seed": seed} for rate in (0.3, 0.1) for seed in (7, 8)]
        assert [leg["values"] for leg in found["first"]] == values
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == shown + 2 and all(f"--set {RATE}=" in line for line in lines[1:-1])
    (tmp_path / "space.yaml").write_text(json.dumps({**SPACE, "space": {"optimizer.lr": [1, 2]}}))
    assert main(words) == 2


@pytest.mark.timeout(300)
def test_a_killed_sweep_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third trial: the first two count, the third goes on from its checkpoint. Then Ctrl-C
    while two run: they save, 130, and nobody is left over. The whole is what it would have been."""
    space = {"search": {"name": "random", "trials": 4}, "space": {RATE: {"log_uniform": [1e-3, 1]}}}
    path, gate = tmp_path / "sweep", tmp_path / "open"
    last_two = {"name": "cases:Gate", "step": 8, "trials": ["0002", "0003"], "open": str(gate)}
    gated = recipe.set("callbacks.gate", last_two)
    gate.touch()
    whole = sweep(gated, space, run_dir=tmp_path / "whole", at_once=2)
    gate.unlink()
    process = started(gated, path, space)
    wait_until(lambda: list(path.glob("trials/0002-*/checkpoints/step-*")), process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while processes_of(path):
        assert time.monotonic() < deadline, "somebody is left"
        time.sleep(0.05)
    [third] = path.glob("trials/0002-*")
    before = [(path / row["run"]).stat().st_mtime_ns for row in rows(path, "begun")[:2]]
    process = started(gated, path, space, "--resume", "--at-once", "2", "--json")
    wait_until(lambda: list(path.glob("trials/0003-*/checkpoints/step-00000008")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "SIGINT: 4 trials begun, go on with: dist-train sweep" in json.loads(out)["error"]
    assert processes_of(path) == []
    assert len(rows(path, "ended")) == 2
    gate.touch()
    assert main(["sweep", str(path), "--resume", "--json"]) == 0
    assert told(path) == told(whole["sweep"])
    assert [(path / row["run"]).stat().st_mtime_ns for row in rows(path, "begun")[:2]] == before
    assert len((third / "command.txt").read_text().splitlines()) >= 2
    for run in path.glob("trials/*"):
        assert_same_run(tmp_path / "whole" / "trials" / run.name, run)


def test_an_end_by_a_signal_is_that_of_a_run() -> None:
    class Begun:
        path = Path("here")

        class journal:
            trials = (1, 2)

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR2, 75)):
        with pytest.raises(Interrupted, match=f"{number.name}: 2 trials begun") as caught:
            raise_if_told([number], Begun)  # type: ignore[arg-type]
        assert caught.value.code == code
    raise_if_told([0], Begun)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"search": "grid"}, ["space: missing"]),
        ({"search": "gird", "space": {RATE: [1]}}, ["did you mean 'grid'"]),
        (
            {"search": "grid", "space": {"optimizer.learning_rte": [0.1]}},
            ["learning_rte", "learning_rate"],
        ),
        (
            {"search": "grid", "space": {"optimzer.learning_rate": [0.1]}},
            ["optimzer", "'optimizer'"],
        ),
        ({"search": "grid", "space": {"data.micro_batch": [7]}}, ["micro_batch"]),
        (
            {"search": "grid", "space": {RATE: [1]}, "objective": {"metric": "los"}},
            ["objective.metric", "did you mean 'loss'"],
        ),
        (
            {"search": "grid", "space": {RATE: [1]}, "objective": {"metric": "accuracy"}},
            ["objective.mode", "min or max"],
        ),
        ({"search": "grid", "space": {RATE: [1]}, "trails": 3}, ["trails: unknown key"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    recipe: Recipe, tmp_path: Path, space: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        sweep(recipe, space, run_dir=tmp_path / "sweep")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_what_goes_on_is_what_was_begun(recipe: Recipe, tmp_path: Path) -> None:
    space = {"search": "grid", "space": {RATE: [0.1]}}
    sweep(recipe, space, run_dir=tmp_path / "sweep")
    with pytest.raises(UserError, match="exists already"):
        sweep(recipe, space, run_dir=tmp_path / "sweep")
    with pytest.raises(UserError, match="--resume: space is not what"):
        sweep(recipe, {**space, "space": {RATE: [0.2]}}, run_dir=tmp_path / "sweep", resume=True)
    with pytest.raises(UserError, match="the recipe is not the one"):
        sweep(recipe.set("seed", 1), space, run_dir=tmp_path / "sweep", resume=True)
    with pytest.raises(UserError, match="--resume: needs --run-dir"):
        sweep(recipe, space, resume=True)
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        sweep(recipe, space, on="slrm")
    with pytest.raises(UserError, match="saves none"):
        bare = recipe.set("callbacks.checkpoint", None)
        sweep(bare, {**space, "search": {"name": "asha", "trials": 9}})


def test_this_machine_takes_nothing_from_a_profile(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default of the user's own that says what a cluster has says nothing of this machine."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles = tmp_path / "dist-train" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "default.yaml").write_text("on: slurm\nnodes: 2\ngpus_per_node: 8\n")
    found = sweep(recipe, SPACE, run_dir=tmp_path / "sweep", ranks=2, dry_run=True)
    assert found["ranks"] == 2
    with pytest.raises(UserError, match="--profile default: --on local takes none"):
        sweep(recipe, SPACE, profile="default", dry_run=True)


def test_gpus_are_shared_out() -> None:
    gpus = ["0", "1", "2", "3"]
    assert [gpus_of(slot, 2, gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
        "0,1",
        "2,3",
        "0,1",
    ]
    assert gpus_of(1, 2, ["5"]) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert gpus_of(0, 1, []) == {}
