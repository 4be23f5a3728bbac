"""The batch script: it reads as expected, and whatever is put into it arrives byte for byte or is refused."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import UserError
from dist_train.launch import requeue
from dist_train.launch.backend import Job, Status
from dist_train.launch.slurm import SCRIPT, Slurm
from dist_train.launch.spec import Spec, make_spec
from dist_train.launch.sweep.conduct import End, Task
from dist_train.launch.sweep.slurm import Slurm as Trials
from dist_train.run_directory import RunDirectory
from dist_train.search import Leg

FAKES = """
scontrol() { printf 'first\\nsecond\\n'; }
srun() { printf '%s\\0' "$@" >> "$TOLD"; printf '\\1' >> "$TOLD"; return 9; }
"""
PLAIN = [
    "$HOME",
    "${HOME}",
    "$(touch CANARY)",
    "`touch CANARY`",
    ";touch CANARY;",
    "&&",
    "|",
    "%j",
    "%",
]
PLAIN += [
    " ",
    "  ",
    "-",
    "--",
    "*",
    "?",
    "~",
    "!",
    "{a,b}",
    "<",
    ">",
    "a",
    "B",
    "0",
    ".",
    "=",
    ",",
    ":",
]
PLAIN += ["\u00e9", "\u4e2d", "\U0001f600", "x" * 100]
QUOTED = [*PLAIN, "'", '"', "\\", "#", "\u202e", "\u2028"]
"""Quoted for the shell all of these can pass; an #SBATCH line holds only the plain ones."""
FORBIDDEN = ["\n", "\r", "\0", "\t", "\x1b[0m", "\ud800"]


def job(run_dir: Path | str = "/runs/run", **settings: Any) -> Job:
    return Job(
        Spec(on="slurm", **settings), "name", Path(run_dir), Path("/project"), python="false"
    )


def test_a_leg_of_a_sweep_pauses() -> None:
    one = job()
    one.until = "1.5 epochs"
    assert "--resume auto --until '1.5 epochs' &" in render(one)
    assert one.train_command()[-2:] == ["--until", "1.5 epochs"]
    assert "--until" not in render(job())


def render(one: Job) -> str:
    return Slurm().render(one)[SCRIPT]


def options(script: str) -> dict[str, str]:
    """The #SBATCH lines, unquoted as Slurm does it."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            key, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[key] = value[1:-1] if value.startswith('"') else value
    return found


def test_what_is_asked_stands_in_the_script() -> None:
    asked = {
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "constraint": "a100&ib",
        "time": "1-00:00:00",
        "mem": "64G",
        "dependency": "afterok:12",
        "mail_user": "me@example.org",
    }
    script = render(
        job(
            nodes=4,
            gpus_per_node=8,
            cpus_per_rank=12,
            notice=90,
            sbatch={"exclusive": "user"},
            **asked,
        )
    )
    found = options(script)
    assert {key.replace("_", "-"): value for key, value in asked.items()}.items() <= found.items()
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("4", "8", "8")
    assert (found["cpus-per-task"], found["signal"], found["open-mode"]) == (
        "12",
        "USR2@90",
        "append",
    )
    assert found["exclusive"] == "user" and "requeue" in found
    assert script.startswith("#!/bin/bash\n")
    last = max(i for i, line in enumerate(script.splitlines()) if line.startswith("#SBATCH"))
    first = min(i for i, line in enumerate(script.splitlines()) if line and line[0] != "#")
    assert last < first, "Slurm stops reading its options at the first command"


def test_only_named_variables_travel_and_no_value_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MINE", "OTHER"):
        monkeypatch.setenv(name, "canary-value")
    script = render(job(env=["MINE", "NOT_SET"]))
    exported = options(script)["export"].split(",")
    assert {"WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MINE"} <= set(exported)
    assert not {"OTHER", "NOT_SET", "ALL"} & set(exported)
    assert "canary-value" not in script and "export=ALL" not in script.lower()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"env": ["A=secret"]}, "name of a variable"),
        ({"env": ["A,ALL"]}, "name of a variable"),
        ({"sbatch": {"export": "ALL"}}, "dist-train sets it"),
        ({"sbatch": {"output": "x"}}, "dist-train sets it"),
        ({"sbatch": {"Bad Key": "x"}}, "an option of sbatch"),
        ({"sbatch": {"comment": 'a" b'}}, "quote"),
        ({"partition": "a\\b"}, "backslash"),
    ],
)
def test_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        render(job(**settings))


def test_a_thousand_names_arrive_byte_for_byte_or_are_refused(tmp_path: Path) -> None:
    rng = random.Random(2026)

    def text(alphabet: list[str]) -> str:
        found = [rng.choice(alphabet) for _ in range(rng.randint(1, 5))]
        return "".join(found) + (rng.choice([*QUOTED, *FORBIDDEN]) if rng.random() < 0.2 else "")

    expected: list[list[str]] = []
    script, refused = FAKES, 0
    for _ in range(1000):
        run_dir, comment = f"/runs/{text(PLAIN)}/{text(PLAIN)}", text(PLAIN)
        image, mounts = text(QUOTED), text(QUOTED)
        flags = {
            "container_image": image,
            "container_mounts": mounts,
            "sbatch": {"comment": comment},
            "constraint": text(PLAIN),
            "account": text(PLAIN),
        }
        name = text(PLAIN)
        try:
            one = job(run_dir)
            one = replace(one, name=name, spec=replace(make_spec({}, {"on": "slurm", **flags})))
            rendered = render(one)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        found = options(rendered)
        assert found["comment"] == comment and found["job-name"] == name
        assert (found["constraint"], found["account"]) == (flags["constraint"], flags["account"])
        assert found["output"].replace("%%", "%") == f"{one.run_dir}/logs/job.log"
        assert len(found) == len(options(render(job()))) + 3, "no option has slipped in"
        containers = [f"--container-image={image}", f"--container-mounts={mounts}"]
        expected.append(["--wait=60", *containers, *one.train_command()])
        script += f"({rendered})\n"
    told = tmp_path / "told"
    done = subprocess.run(
        ["bash"],
        input=script.encode(),
        env={
            "PATH": "/usr/bin:/bin",
            "TOLD": str(told),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n",
        },
        cwd=tmp_path,
        capture_output=True,
        timeout=240,
    )
    arrived = [one.split(b"\0")[:-1] for one in told.read_bytes().split(b"\1")[:-1]]
    assert arrived == [[word.encode() for word in words] for words in expected], done.stderr[-500:]
    assert [path.name for path in tmp_path.iterdir()] == ["told"]
    print(f"{len(expected)} arrived, {refused} refused")
    assert min(len(expected), refused) > 50, "the alphabet makes both"


# ---------------------------------------------------------------------------------------------------------------------
# After srun: again, back into the queue, or the end


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A launched run whose Slurm notes what it is asked, answers `shown` to scontrol, and may refuse to requeue."""
    run = RunDirectory.create_at(tmp_path / "run")
    one = replace(job(run.path, max_restarts=1), id="7")
    one.write()
    state: dict[str, Any] = {
        "run": run,
        "asked": [],
        "shown": "JobState=RUNNING Restarts=0 ",
        "refuse": False,
        "steps": "7.batch\n",
    }

    def slurm(command: str, *arguments: str) -> str:
        state["asked"].append([command, *arguments])
        if command == "scontrol" and arguments[0] == "requeue" and state["refuse"]:
            raise UserError("scontrol: Requested operation is presently disabled")
        if command == "squeue":
            return state["steps"]
        return "8\n" if command == "sbatch" else state["shown"]

    monkeypatch.setattr(requeue, "slurm", slurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return state


def asked(queue: dict[str, Any]) -> list[list[str]]:
    return [one for one in queue["asked"] if one[1] not in ("show", "--noheader")]


def test_an_interruption_is_requeued_once(queue: dict[str, Any]) -> None:
    assert requeue.decide(queue["run"].path, 75) == requeue.LEAVE
    assert asked(queue) == [["scontrol", "requeue", "7"]]


@pytest.mark.parametrize(
    "shown", ["JobState=CANCELLED Restarts=0 ", "JobState=RUNNING Restarts=1 "]
)
def test_what_slurm_has_ended_is_left_to_it(queue: dict[str, Any], shown: str) -> None:
    queue["shown"] = shown
    assert requeue.decide(queue["run"].path, 75) == requeue.LEAVE
    assert asked(queue) == []


def test_a_refused_requeue_becomes_a_job_that_waits(queue: dict[str, Any]) -> None:
    queue["refuse"] = True
    requeue.decide(queue["run"].path, 75)
    script = str(queue["run"].path / SCRIPT)
    assert asked(queue)[1] == ["sbatch", "--parsable", "--dependency=afterany:7", script]
    assert Job.read(queue["run"].path).id == "7,8"


def test_members_that_are_refused_at_once_are_all_remembered(queue: dict[str, Any]) -> None:
    queue["refuse"] = True
    job = Job.read(queue["run"].path)
    with ThreadPoolExecutor(8) as members:
        list(members.map(lambda _: requeue._requeue(job), range(16)))
    assert Job.read(job.run_dir).id == "7" + 16 * ",8"


def test_failures_start_again_while_that_leads_on(queue: dict[str, Any]) -> None:
    path = queue["run"].path
    assert requeue.decide(path, 1) == requeue.AGAIN  # the first without progress
    (path / "checkpoints" / "step-00000006").mkdir()
    assert requeue.decide(path, 137) == requeue.AGAIN
    assert requeue.decide(path, 75) == requeue.LEAVE  # in vain, once
    assert requeue.decide(path, 1) == requeue.LEAVE  # twice: the limit
    assert asked(queue) == [["scontrol", "requeue", "7"]]


def test_where_a_step_does_not_end_nothing_starts_beside_it(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "PATIENCE", 0.0)
    queue["steps"] = "7.3\n7.batch\n"
    assert requeue.decide(queue["run"].path, 1) == requeue.LEAVE
    assert asked(queue) == [["scontrol", "requeue", "7"]]


@pytest.mark.parametrize("code", [0, 2])
def test_done_and_mistakes_end_it(queue: dict[str, Any], code: int) -> None:
    assert requeue.decide(queue["run"].path, code) == requeue.LEAVE
    assert queue["asked"] == []
    ended = queue["run"].path / "logs" / "job.ended"
    assert json.loads(ended.read_text()) == {"code": code}


@pytest.mark.parametrize("gpus", ["8", "h100:8"])
def test_gpus_of_a_kind_are_counted_for_ray(tmp_path: Path, gpus: str) -> None:
    """What `sbatch --gpus-per-node=h100:8` exports."""
    for name, line in (("scontrol", "echo n1"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_PER_NODE": gpus}
    environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    script = Path(__file__).parents[1] / "slurm" / "ray.sbatch"
    command = ["bash", str(script), str(tmp_path / "run"), "tiny"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    words = done.stdout.splitlines()
    assert words[words.index("--gpus-per-node") + 1] == "8", done.stderr


def test_a_sweep_outlasts_a_controller_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs go on meanwhile: it asks again, where it would else end and take them with it."""
    answers: list[Any] = [
        UserError("squeue: Unable to contact slurm controller"),
        "running",
        "done",
    ]

    class Queue(Slurm):
        def status(self, job: Job) -> Status:
            answer = answers.pop(0)
            if isinstance(answer, UserError):
                raise answer
            return Status(answer)

    monkeypatch.setattr("dist_train.launch.sweep.slurm.LOOK", 0.0)
    monkeypatch.setattr("dist_train.launch.sweep.slurm.ASK", -1.0)
    (tmp_path / "code").mkdir()
    one = replace(job(tmp_path / "run"), id="7")
    one.run_dir.mkdir()
    one.write()
    place = Trials(None, one.spec, tmp_path)  # type: ignore[arg-type]
    place.queue = Queue()
    task = Task(Leg(0, {}), one.run_dir, None, None)  # type: ignore[arg-type]
    place._jobs.append((task, one))
    assert [place.ended() for _ in range(3)] == [[], [], [End(task)]]
    assert answers == [] and place.tasks == []


def test_the_committed_template_names_no_secret_and_no_blanket_export() -> None:
    text = (Path(__file__).parents[1] / "slurm" / "train.sbatch").read_text()
    assert not re.search(r"(?i)export=all|api_key|token|secret", text)
