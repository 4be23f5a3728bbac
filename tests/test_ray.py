"""Ray: two raylets on this machine, one of them lost, or the head lost; and who may use a cluster."""

from __future__ import annotations

import http.server
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest

from dist_train.callbacks.wandb import history
from dist_train.errors import Interrupted, UserError
from dist_train.launch import ray as backend
from dist_train.launch.cli import main
from dist_train.launch.jobs import statuses
from dist_train.launch.sweep import sweep
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, spawn_ranks

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
STEPS, GATES = 60, (30, 50)
TOKEN = secrets.token_hex(32)
"""Of every cluster: Ray reads the token once a process, and would show the first cluster's to the second."""

GATE = '''
import time
from pathlib import Path
import dist_train
from dist_train.callbacks import Callback

class Gate(Callback):
    """Say whose code this is, and wait, after some steps, until there is the file `open` or a signal comes."""

    def __init__(self, steps, open):
        self.steps, self.open = steps, Path(open)

    def step_ends(self, run):
        if run.step in self.steps:
            (run.directory.path / f"at-{run.step}").write_text(dist_train.__file__)
            while not (self.open.exists() or run.interruption.reason):
                time.sleep(0.05)
'''


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def eventually(what: Callable[[], Any], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)


class Raylets:
    """A Ray cluster of two nodes with a core each, whose Jobs API asks for a token."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        port = free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        head = {
            "num_cpus": 1,
            "node_ip_address": HEAD,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add_second()

    def add_second(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, node_ip_address=SECOND)

    def kill_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def kill_head(self) -> None:
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)

    def end(self) -> None:
        self.cluster.shutdown()


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Raylets]]:
    """Starts clusters, one after the other."""
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": "",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("ray")  # it reads these variables as it is imported
    started: list[Raylets] = []

    def start() -> Raylets:
        started.append(Raylets())
        return started[-1]

    yield start
    for cluster in started:
        cluster.end()


def step_of(run_dir: Path) -> int:
    return max((row["step"] for row in RunDirectory(run_dir).rows()), default=0)


def state_of(run_dir: Path) -> str:
    return statuses(str(run_dir))[run_dir.name]["state"]


def processes_of(run_dir: Path) -> list[str]:
    """The command lines that name the run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run_dir) in line:
            found.append(line)
    return found


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    if " " in sys.executable:
        pytest.skip("Ray cannot start workers from a path with a space")
    plan = cases.tiny_recipe("resnet", tiny_data, duration=f"{STEPS} steps", strategy="ddp")
    plan = plan.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    plan = plan.set("callbacks.checkpoint.every", "20 steps").set("log.every", "1 step")
    file = tmp_path / "project" / "tiny.yaml"
    file.parent.mkdir()
    (file.parent / "gated.py").write_text(GATE)
    gate = {"name": "gated:Gate", "steps": list(GATES), "open": str(tmp_path / "open")}
    gated = plan.set("callbacks.gate", gate).set("callbacks.wandb", {"mode": "offline"})
    file.write_text(gated.to_yaml())
    spawn_ranks(2, cases.train_case, plan.as_dict(), str(tmp_path / "whole"), "", None, timeout=240)
    return file


def launch(recipe: Path, run_dir: Path) -> None:
    words = ["--on", "ray", "--nodes", "2", "--run-dir", str(run_dir)]
    assert main(["launch", str(recipe), *words]) == 0


def at_the_gate(run_dir: Path, step: int) -> None:
    eventually((run_dir / f"at-{step}").exists)


def ended(run_dir: Path, state: str = "done") -> None:
    eventually(lambda: state_of(run_dir) not in ("waiting", "running"))
    assert state_of(run_dir) == state, (run_dir / "logs" / "job.log").read_text()


def assert_as_unbroken(run_dir: Path) -> None:
    """The same bits, one row a step, in the tracker too, and nobody left over."""
    assert_same_run(run_dir.parent / "whole", run_dir)
    for rows in (RunDirectory(run_dir).rows(), history(run_dir / "wandb")):
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    eventually(lambda: not processes_of(run_dir), 10)


@pytest.mark.timeout(600)
def test_cancelled_and_then_a_raylet_is_lost(
    recipe: Path, tmp_path: Path, raylets: Callable[[], Raylets]
) -> None:
    cluster, run_dir = raylets(), tmp_path / "run"
    launch(recipe, run_dir)
    at_the_gate(run_dir, GATES[0])
    assert main(["cancel", str(run_dir)]) == 0
    ended(run_dir, "interrupted")
    assert step_of(run_dir) == GATES[0]
    launch(run_dir, run_dir)
    at_the_gate(run_dir, GATES[1])
    cluster.kill_second()
    log = run_dir / "logs" / "job.log"
    eventually(lambda: "starting again" in log.read_text())
    (tmp_path / "open").touch()
    cluster.add_second()
    ended(run_dir)
    ours = run_dir / "code" / "dist_train" / "__init__.py"
    assert (run_dir / f"at-{GATES[1]}").read_text() == str(ours), "not the run directory's code"
    assert_as_unbroken(run_dir)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_head_is_lost(recipe: Path, tmp_path: Path, raylets: Callable[[], Raylets]) -> None:
    """And with it the cluster: a new one goes on from the run directory."""
    cluster, run_dir = raylets(), tmp_path / "run"
    launch(recipe, run_dir)
    at_the_gate(run_dir, GATES[0])
    cluster.kill_head()
    cluster.end()
    eventually(lambda: not processes_of(run_dir), 30)
    assert step_of(run_dir) == GATES[0] - 1  # the row of a step comes after the gate
    (tmp_path / "open").touch()
    raylets()
    launch(run_dir, run_dir)
    ended(run_dir)
    assert_as_unbroken(run_dir)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_sweep_by_tune_whose_trials_are_of_two_ranks(
    recipe: Path, tmp_path: Path, raylets: Callable[[], Raylets], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end in its first trial, while the second waits, and gone on with: each is the run that `train` makes."""
    monkeypatch.setenv("RAY_ADDRESS", raylets().cluster.address)
    path, rate = tmp_path / "sweep", "optimizer.learning_rate"
    plan = Recipe.load(recipe, ["launch.nodes=2", "callbacks.wandb=null"])
    plan = plan.set("evaluate", {"split": "test", "every": "20 steps", "metrics": ["loss"]})
    objective = {"metric": "loss", "mode": "min"}
    space = {"search": "grid", "objective": objective, "space": {rate: [0.1, 0.02]}}

    def told_in_the_first() -> None:
        eventually(lambda: list(path.glob(f"trials/0000-*/at-{GATES[0]}")), 400)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=told_in_the_first)
    thread.start()
    with pytest.raises(Interrupted, match="SIGTERM: 2 trials begun") as caught:
        sweep(plan, space, on="ray", run_dir=path)
    thread.join()
    assert caught.value.code == 75
    eventually(lambda: not processes_of(path), 10)
    (tmp_path / "open").touch()
    found = sweep(str(path), on="ray", resume=True)
    assert (found["trials"], found["failed"], found["stopped"]) == (2, 0, "")
    eventually(lambda: not processes_of(path), 10)
    assert not (path / "ray").exists()
    runs = sorted(path.glob("trials/*"))
    for run in runs:
        twin = tmp_path / f"twin-{run.name}"
        settings = Recipe.load(run).set("callbacks.gate", None).as_dict()
        spawn_ranks(2, cases.train_case, settings, str(twin), "", None, timeout=240)
        assert_same_run(twin, run)
    environ = (runs[0] / "environment.json").read_text()
    assert '"world_size": 2' in environ and '"earlier": [\n    {' in environ


# ---------------------------------------------------------------------------------------------------------------------
# Who may use a cluster


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"},
            ["RAY_AUTH_MODE=disabled", "anyone"],
        ),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, ["/no/such/file", "get-auth-token"]),
    ],
)
def test_no_job_without_a_token(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        backend.check_token(environ)
    assert all(word in str(caught.value) for word in words)


def test_a_token_is_for_its_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o644)
    with pytest.raises(UserError, match="others can read this token; chmod 600"):
        backend.check_token({"RAY_AUTH_TOKEN_PATH": str(file)})
    file.chmod(0o600)
    backend.check_token({"RAY_AUTH_TOKEN_PATH": str(file)})
    backend.check_token({"RAY_AUTH_TOKEN": "secret"})


@pytest.mark.parametrize(
    ("code", "word"), [(200, "takes jobs from anyone"), (404, "status 404"), (401, "")]
)
def test_no_job_for_a_cluster_that_asks_for_no_token(code: int, word: str) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        if word:
            with pytest.raises(UserError, match=word):
                backend.check_cluster(url)
        else:
            backend.check_cluster(url)
        thread.join(timeout=10)


def test_no_cluster_is_said_so() -> None:
    with pytest.raises(UserError, match="no Ray cluster answers"):
        backend.check_cluster(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="expected a URL like"):
        backend.check_cluster("head:8265")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 1, 1: backend.LOST}, "rank 1: its node is gone"),
        ({0: 1, 1: -9}, "rank 1 was ended by SIGKILL"),
        ({0: None, 1: 1}, "rank 1 ended with exit code 1"),
        ({0: 0, 1: 2}, "rank 1 ended with exit code 2"),
    ],
)
def test_the_cause_is_named_first(codes: dict[int, int | None], expected: str) -> None:
    assert backend._verdict(codes)[1] == expected
