"""Launching: settings in layers, checks before the queue, code as it was, and what was launched found again."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import plan_cases
import pytest

from dist_train import assembly
from dist_train.errors import UserError
from dist_train.forecast.footprint import RESERVED, rank_memory
from dist_train.forecast.hardware import DEVICES
from dist_train.forecast.tracing import foresee
from dist_train.launch.backend import BACKENDS, Backend, Job, Status, follow
from dist_train.launch.jobs import members, prepare, statuses
from dist_train.launch.local import HELD, Local
from dist_train.launch.preflight import rank_limit
from dist_train.launch.snapshot import take_snapshot
from dist_train.launch.spec import Spec, make_spec
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory


@pytest.fixture
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "dist-train" / "profiles"
    folder.mkdir(parents=True)
    return folder


def test_recipe_then_profile_then_flags(own_profiles: Path) -> None:
    (own_profiles / "site.yaml").write_text("partition: gpu\nnodes: 2\nsbatch: {exclusive: user}\n")
    recipe = {"on": "slurm", "profile": "site", "nodes": 8, "time": "1-00:00:00"}
    spec = make_spec(recipe, {"partition": "fast", "qos": None, "env": []})
    assert (spec.on, spec.nodes, spec.partition, spec.time) == ("slurm", 2, "fast", "1-00:00:00")
    assert spec.sbatch == {"exclusive": "user"}


def test_the_users_default_profile_counts_without_being_named(own_profiles: Path) -> None:
    (own_profiles / "default.yaml").write_text("account: mine\n")
    assert make_spec({}, {}).account == "mine"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nodse": 2}, ["launch.nodse", "nodes"]),
        ({"nodes": 0}, ["launch.nodes", "1 or more"]),
        ({"nodes": True}, ["launch.nodes"]),
        ({"nodes": "2"}, ["launch.nodes", "'2'"]),
        ({"time": "soon"}, ["launch.time", "HH:MM:SS"]),
        ({"mem": "lots"}, ["launch.mem", "64G"]),
        ({"array": "0-"}, ["launch.array", "0-3"]),
        ({"env": "HOME"}, ["launch.env", "list"]),
        ({"setup": ["a\nb"]}, ["launch.setup", "one line"]),
        ({"partition": "a\x00b"}, ["launch.partition", "one line"]),
        ({"profile": "nowhere"}, ["profile", "'nowhere'"]),
        ({"profile": "/no/file.yaml"}, ["/no/file.yaml"]),
        ({"array": "0-3", "each": {"seed": [1, 2]}}, ["each.seed", "2 values", "4"]),
        ({"each": {"seed": [1, 2]}}, ["each", "array"]),
        ({"sbatch": {"exclusive": 1}}, ["launch.sbatch"]),
        ({"notice": 1}, ["launch.notice", "10 or more"]),
    ],
)
def test_a_wrong_setting_is_named(
    own_profiles: Path, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        make_spec(settings, {})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "ids"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-9:4%2", [0, 4, 8]), ("7,1-2", [1, 2, 7])],
)
def test_members_of_an_array(array: str, ids: list[int]) -> None:
    assert Spec(array=array).members == ids


def test_members_differ_by_seed_or_by_what_is_asked(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data)
    job = prepare(recipe, {"ranks_per_node": 1}, tmp_path / "run", dry_run=True).job
    job.spec = Spec(array="0-2")
    assert [one.seed for one in members(recipe, job)] == [7, 8, 9]
    job.spec = Spec(array="0-1", each={"optimizer.learning_rate": [0.1, 0.2]})
    made = members(recipe, job)
    assert [(one.seed, one.optimizer["learning_rate"]) for one in made] == [(7, 0.1), (7, 0.2)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"ranks_per_node": 3}, ["4 micro-batches", "1, 2, 4"]),
        ({"on": "lokal"}, ["lokal", "'local'"]),
        ({"nodes": 2}, ["--nodes 2", "expected 1"]),
    ],
)
def test_checked_before_anything_is_queued(
    tiny_data: Path, tmp_path: Path, flags: dict[str, Any], words: list[str]
) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data)
    with pytest.raises(UserError) as caught:
        prepare(recipe, flags, tmp_path / "run", dry_run=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


def test_data_and_disk_are_checked(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data)
    for key, value, word in (
        ("data.path", str(tmp_path / "nowhere"), "nowhere"),
        ("data.split", "trian", "no split"),
    ):
        with pytest.raises(UserError, match=word):
            prepare(recipe.set(key, value), {}, tmp_path / "run", dry_run=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder"):
        prepare(recipe, {}, tmp_path / "file" / "run", dry_run=True)


def test_what_cannot_fit_is_refused_with_what_would(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plan_cases.large(tiny_data, "transformer", 4, "ddp").set("model.dim", 512)
    recipe = recipe.set("callbacks.checkpoint", {"keep": 3})
    step, _ = foresee(recipe, assembly.build_one, micro_batches=2)
    need = sum(rank_memory(step, {"name": "ddp"}, 2, 2).values())
    flags = {"ranks_per_node": 2, "gpu": "h100"}
    small = replace(DEVICES["h100"], memory=0.935 * need / (1 - RESERVED) / 2**30)
    with monkeypatch.context() as patched:
        patched.setitem(DEVICES, "h100", small)
        with pytest.raises(UserError) as caught:
            prepare(recipe, flags, tmp_path / "run")
        for word in (
            "under ddp, and a GPU (h100) has",
            "strategy zero3 or data.micro_batch 2 would",
        ):
            assert word in str(caught.value)
        prepare(recipe.set("strategy", "zero3"), flags, tmp_path / "run")
        prepare(recipe.set("data.micro_batch", 2), flags, tmp_path / "run")
    weights = sum(step.weights.values())
    monkeypatch.setattr("dist_train.launch.preflight.MAX_BYTES", 0)
    # adamw triples the weights; three checkpoints are kept, and the next is whole before the oldest goes
    free = 4 * 3 * weights - 1
    monkeypatch.setattr("dist_train.launch.preflight.free_bytes", lambda path: free)
    with pytest.raises(UserError, match=r"bytes free, expected .*: 4 checkpoints of"):
        prepare(recipe, flags, tmp_path / "run")
    with pytest.raises(UserError, match="did you mean 'h100'"):
        prepare(recipe, {"gpu": "h10"}, tmp_path / "run", dry_run=True)


class Nowhere(Backend):
    """Takes every job, and forgets it."""

    def check(self, job: Job, dry_run: bool) -> None: ...

    def render(self, job: Job) -> dict[str, str]:
        return {}

    def submit(self, job: Job) -> str:
        return "1"

    def status(self, job: Job) -> Status:
        return Status("done")

    def cancel(self, job: Job) -> None: ...


def test_a_run_goes_on_under_its_own_recipe(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would change the run is refused; how it is spread may change, and does."""
    monkeypatch.setattr("dist_train.launch.jobs.backend", lambda name: Nowhere())
    monkeypatch.setattr("dist_train.launch.jobs.take_snapshot", lambda recipe, code: None)
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="ddp")
    run_dir = tmp_path / "run"
    prepare(recipe, {}, run_dir).submit()
    with pytest.raises(UserError, match=r"^seed is 99, but .*run was begun with 7;"):
        prepare(recipe.set("seed", 99), {}, run_dir, dry_run=True)
    prepare(recipe.set("strategy", "zero2"), {}, run_dir).submit()
    assert Recipe.load(run_dir).strategies == {"model": {"name": "zero2"}}


def test_a_dry_run_needs_no_torch(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(cases.tiny_recipe("resnet", tiny_data).to_yaml())
    code = (
        "import sys; from dist_train.launch.cli import main\n"
        "code = main(['launch', 'tiny.yaml', '--on', 'slurm', '--gpu', 'h100', '--dry-run'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=240, cwd=tmp_path)
    assert done.returncode == 0


def test_the_snapshot_is_code_and_no_more(tmp_path: Path) -> None:
    project = tmp_path / "project"
    kept = ("mine/__init__.py", "mine/net.py", "mine/data/tables.csv", "pyproject.toml", "kept.log")
    left = (".git/HEAD", "data/big.bin", "runs/a/b", "mine/x.pyc", "out/y.txt", "a.tar", "b.log")
    for name in (*kept, *left):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / ".gitignore").write_text("# made\nout/\n/b.log\n")
    (project / "link.py").symlink_to("/etc/hostname")
    recipe = Recipe.restore(
        cases.tiny_recipe("resnet", tmp_path).set("model.name", "mine.net:Net").as_dict(),
        "recipe",
        project,
    )
    take_snapshot(recipe, tmp_path / "code")
    copied = tmp_path / "code" / "project"
    files = {f.relative_to(copied).as_posix() for f in copied.rglob("*") if f.is_file()}
    assert files == set(kept)
    assert (tmp_path / "code" / "dist_train" / "models" / "resnet.py").is_file()
    assert (tmp_path / "code" / "dist_train" / "launch" / "cli.py").is_file()


def test_too_much_for_a_snapshot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.launch.snapshot.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="expected at most 1,000"):
        take_snapshot(cases.tiny_recipe("resnet", tmp_path), tmp_path / "code")


def test_a_snapshot_that_was_refused_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was copied before nothing is left, or ranks would run half of the code."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text("1")
    (project / "large.bin").write_bytes(bytes(64 << 20))
    settings = cases.tiny_recipe("resnet", tmp_path).set("model.name", "mine:Net").as_dict()
    recipe = Recipe.restore(settings, "recipe", project)
    with pytest.raises(UserError, match=r"the largest is .*large\.bin"):
        take_snapshot(recipe, tmp_path / "code")
    assert not (tmp_path / "code").exists()
    (project / ".gitignore").write_text("*.bin\n")
    take_snapshot(recipe, tmp_path / "code")
    assert (tmp_path / "code" / "project" / "mine.py").is_file()
    assert (tmp_path / "code" / "dist_train" / "run.py").is_file()


def test_what_runs_already_is_left_as_it_is(tmp_path: Path) -> None:
    """Whoever is second, by however little, takes nothing from the first: its number, how it ended."""
    RunDirectory.create_at(tmp_path / "run")
    job = Job(Spec(), "tiny", tmp_path / "run", tmp_path)
    with (tmp_path / "run" / HELD).open("w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is running already"):
            Local().submit(job)
        assert Local().status(job).state == "running"


def test_one_that_cannot_be_asked_about_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    for name, on in (("far-abc", "slurm"), ("near-abc", "local")):
        run_dir = tmp_path / "runs" / "project" / name
        (run_dir / "logs").mkdir(parents=True)
        Job(Spec(on=on), name, run_dir, tmp_path, id="7").write()
    found = statuses(None)
    assert {name: one["state"] for name, one in found.items()} == {
        "far-abc": "unknown",
        "near-abc": "failed",
    }
    assert "no squeue on this machine" in found["far-abc"]["detail"]
    with pytest.raises(UserError, match="no squeue on this machine"):
        statuses("far")


def test_output_is_followed_whatever_it_is_cut_into(tmp_path: Path) -> None:
    told = "\N{EURO SIGN}" * 500_000  # 3 bytes each: a piece of 1 MiB ends within one
    file = tmp_path / "log"
    pieces = follow(file)
    assert next(pieces) == ""
    file.write_text(told, encoding="utf-8")
    assert next(pieces) + next(pieces) == told and next(pieces) == ""


@pytest.mark.parametrize(
    ("mem", "limit"),
    [("64G", 2**35 * (1 - RESERVED)), ("512", 2**28 * (1 - RESERVED)), ("0", math.inf)],
)
def test_memory_as_slurm_says_it(mem: str, limit: float) -> None:
    """A rank's share of it; 0 is all that a node has, which is not known here."""
    assert rank_limit(Spec(on="slurm", ranks_per_node=2, mem=mem))[0] == limit


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dist_train", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=cwd)


def test_launched_here_and_found_by_name(tiny_data: Path, tmp_path: Path) -> None:
    """The whole way: launch, follow, status, logs; from the code as it was, and once more when it has ended."""
    recipe = cases.tiny_recipe("resnet", tiny_data, duration="4 steps")
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    arguments = ("tiny.yaml", "--on", "local", "--ranks-per-node", "2", "--follow", "--json")
    done = command("launch", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout.splitlines()[0])
    run_dir = Path(launched["run_dir"])
    assert run_dir.parent == tmp_path / "runs" / "tests"
    assert run_dir.stat().st_mode & 0o077 == 0
    state = json.loads(command("status", "resnet", "--json", cwd=tmp_path).stdout)
    assert state[run_dir.name]["state"] == "done"
    assert command("logs", run_dir.name, cwd=tmp_path).returncode == 0
    assert cases.RunDirectory(run_dir).rows()[-1]["step"] == 4
    ended = command("cancel", run_dir.name, cwd=tmp_path)
    assert ended.returncode == 2 and "not running" in ended.stderr


@pytest.mark.parametrize("on", [on for on in BACKENDS if on != "ray" or " " not in sys.executable])
def test_a_dry_run_imports_nothing_slow(tiny_data: Path, tmp_path: Path, on: str) -> None:
    """So it answers at once: modules are counted, for time would depend on what else the machine does."""
    (tmp_path / "tiny.yaml").write_text(cases.tiny_recipe("resnet", tiny_data).to_yaml())
    script = (
        "import sys\nfrom dist_train.launch.cli import main\n"
        f"code = main(['launch', 'tiny.yaml', '--on', '{on}', '--dry-run'])\n"
        "slow = {'torch', 'deepspeed', 'accelerate', 'ray', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'imports {slow}' if slow else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=os.environ | {"RAY_AUTH_TOKEN": "x"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# "), "the files that it would write"
    assert not (tmp_path / "runs").exists()
