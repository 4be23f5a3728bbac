"""The tracker's mirror: each row once, over kills and resumes, and never at the run's expense."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_train.callbacks import wandb as mirror
from dist_train.callbacks.wandb import WandbMirror, history
from dist_train.errors import UserError
from dist_train.run_directory import RunDirectory

wandb = pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # it remembers the environment of its first use in a process
    for name in (
        "API_KEY",
        "MODE",
        "DIR",
        "RUN_ID",
        "PROJECT",
        "ENTITY",
        "BASE_URL",
        "NAME",
        "TAGS",
    ):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "vision", "resnet")
    made.write_recipe("project: vision\nname: resnet\nhub: {token: hunter2}\n")
    return made


def fake_run(directory: RunDirectory) -> Any:
    return SimpleNamespace(directory=directory, world=SimpleNamespace(is_main=True))


def train(
    callback: WandbMirror,
    directory: RunDirectory,
    steps: range,
    ending: Callable[[], None] = lambda: None,
) -> None:
    """Drive the callback as the trainer does; `ending` is called when all rows are logged."""
    run = fake_run(directory)
    callback.configure(None)  # type: ignore[arg-type]
    callback.run_begins(run)
    for step in steps:
        row = {"step": step, "loss": 1 / step}
        directory.append_row(row)
        callback.logged(run, row)
    ending()
    callback.run_ends(run)


def stored(directory: RunDirectory) -> list[Path]:
    """The tracker's files once its process has written them out."""
    wandb.teardown()
    return mirror.stored_files(directory)


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


# A trainer in small: a checkpoint each 7th step, a row each step, SIGKILL of itself after step
# `kill`. Rows are large enough that the tracker writes some of them and has some in its memory.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from dist_train.callbacks.wandb import WandbMirror
from dist_train.run_directory import RunDirectory

path, kill, drain, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
directory = RunDirectory.open(path)
saved = path / "saved"
step = int(saved.read_text()) if saved.exists() else 0
directory.lock()
directory.cut(step)
run = SimpleNamespace(directory=directory, world=SimpleNamespace(is_main=True))
callback = WandbMirror()
callback.run_begins(run)
while step < total:
    step += 1
    row = {"step": step} | {f"{i}/{'x' * 60}": step + i / 7 for i in range(8)}
    directory.append_row(row)
    callback.logged(run, row)
    if step == kill:
        while drain and not callback.is_up_to_date():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    if step % 7 == 0:
        saved.write_text(str(step))
callback.run_ends(run)
"""


def test_each_row_once_over_kills_and_resumes(directory: RunDirectory) -> None:
    total, draw = 400, random.Random(2)
    kills = sorted(draw.sample(range(60, total), 4))
    for number, kill in enumerate([*kills, -1]):
        drain = number % 2 == 0
        command = [
            sys.executable,
            "-c",
            KILLED,
            *map(str, (directory.path, kill, int(drain), total)),
        ]
        ended = subprocess.run(command, timeout=240, capture_output=True, text=True)
        assert ended.returncode == (0 if kill == -1 else -signal.SIGKILL), ended.stderr
    rows = directory.rows()
    assert steps_of(rows) == list(range(1, total + 1))
    mirrored = [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in history(directory.path / "wandb")
    ]
    assert mirrored == rows
    files = mirror.stored_files(directory)
    held = [len(history(file)) for file in files]
    assert sum(count > 0 for count in held) > 1  # a killed start left rows behind
    assert len({file.name for file in files}) == 1  # one run id for life


@pytest.mark.parametrize("keep", [0, 5, 7, 2_000, 32_768, 32_775, 40_001])
def test_a_torn_file_keeps_its_whole_rows(
    directory: RunDirectory, tmp_path: Path, keep: int
) -> None:
    for step in range(1, 201):
        directory.append_row({"step": step} | {f"{i}/{'x' * 60}": step for i in range(4)})
    whole = mirror.Mirror(directory, "offline", WandbMirror().options)
    whole.finish()
    (file,) = stored(directory)
    assert steps_of(history(file)) == list(range(1, 201))
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(file.read_bytes()[:keep])
    rows = mirror.seal(torn)
    assert steps_of(rows) == list(range(1, len(rows) + 1)) and len(rows) < 200
    assert bool(rows) == (keep >= 2_000)
    assert history(torn) == rows and torn.stat().st_size <= keep
    damaged = bytearray(file.read_bytes())
    damaged[max(keep, mirror.HEADER_BYTES)] ^= 1
    torn.write_bytes(damaged)
    assert history(torn) == rows


def test_offline_without_a_key_says_how_to_sync(
    directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=mirror.__name__):
        train(WandbMirror(), directory, range(1, 4))
    assert caplog.messages == [
        f"wandb: offline; `dist-train sync {directory.path}` sends this run to the server"
    ]
    (file,) = stored(directory)
    assert b"vision" in file.read_bytes() and b"hunter2" not in file.read_bytes()


def test_images_captions_and_figures_that_are_not_finite(directory: RunDirectory) -> None:
    from dist_train.pictures.png import save_grid

    save_grid(directory.samples / "grid.png", np.full((1, 1, 4, 4), 0.5))
    images = {"grid": "samples/grid.png", "gone": "samples/gone.png"}
    directory.append_row(
        {"step": 1, "loss": float("inf"), "images": images, "captions": {"grid": "x"}}
    )
    mirror.Mirror(directory, "offline", WandbMirror().options).finish()
    (row,) = history(*stored(directory))
    assert row["loss"] == "Infinity" or row["loss"] == float("inf")
    assert row["grid"]["_type"] == "image-file" and row["grid"]["caption"] == "x"
    assert "gone" not in row and "captions" not in row


def test_disabled_does_nothing(directory: RunDirectory) -> None:
    train(WandbMirror(mode="disabled"), directory, range(1, 4))
    assert not (directory.path / "wandb").exists()
    assert steps_of(directory.rows()) == [1, 2, 3]


def test_a_mode_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'onlin' is none of online, offline, disabled"):
        WandbMirror(mode="onlin")
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE"):
        WandbMirror().configure(None)  # type: ignore[arg-type]


def test_a_dead_server_costs_the_run_nothing(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "START_SECONDS", 2.0)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    given, start = threading.Event(), mirror.Mirror._start

    def starts_late(self: mirror.Mirror) -> Any:
        given.wait()  # for ever, if a row waited for the tracker
        return start(self)

    monkeypatch.setattr(mirror.Mirror, "_start", starts_late)
    with caplog.at_level(logging.WARNING, logger=mirror.__name__):
        train(WandbMirror(), directory, range(1, 501), given.set)
    assert steps_of(directory.rows()) == list(range(1, 501))
    messages = [r.getMessage() for r in caplog.records if r.name == mirror.__name__]
    assert len(messages) == 1 and "mirroring ends" in messages[0]
    with pytest.raises(UserError, match="sync: wandb"):
        mirror.sync(directory.path)


# ------------------------------------------------------------------------------------------------
# Online: wandb's own client against a server that keeps what it is sent


class Server(ThreadingHTTPServer):
    """The four calls of a W&B server that a run needs; `history` is its rows by line."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[int, dict[str, Any]] = {}
        self.run: dict[str, Any] | None = None
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "vision", "entity": {"id": "e", "name": "me"}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": self.bucket()}}
        if operation == "UpsertBucket":
            self.run = variables
            bucket = {"id": "r", "name": variables["name"], "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self) -> dict[str, Any] | None:
        if self.run is None:
            return None
        last = [self.history[max(self.history)]] if self.history else []
        return {
            "id": "r",
            "name": self.run["name"],
            "summaryMetrics": json.dumps(last[0] if last else {}),
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in last]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/graphql":
            call = json.loads(body)
            self.reply({"data": self.server.answer(call["operationName"], call.get("variables"))})
            return
        if self.path.endswith("/file_stream"):
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            for number, line in enumerate(sent["content"] if sent else []):
                self.server.history[sent["offset"] + number] = json.loads(line)
        self.reply({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    def reply(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "me")
    yield server
    server.shutdown()
    server.server_close()


def on_server(server: Server) -> list[int]:
    return [server.history[line]["step"] for line in sorted(server.history)]


def test_online_goes_on_from_the_servers_last_step(directory: RunDirectory, server: Server) -> None:
    train(WandbMirror(), directory, range(1, 31))
    assert on_server(server) == list(range(1, 31))
    directory.cut(20)  # the server is ahead of the checkpoint: 21 to 30 are computed again
    train(WandbMirror(), directory, range(21, 41))
    assert on_server(server) == list(range(1, 41))
    for step in range(41, 51):  # the server is behind: these were logged while it was away
        directory.append_row({"step": step, "loss": 1 / step})
    train(WandbMirror(), directory, range(51, 61))
    assert on_server(server) == list(range(1, 61))


def test_sync_sends_an_offline_run_once(directory: RunDirectory, server: Server) -> None:
    train(WandbMirror(mode="offline"), directory, range(1, 31))
    assert server.history == {}
    assert mirror.sync(directory.path) == {
        "run_id": mirror.run_id(directory),
        "rows": 30,
        "sent": 30,
    }
    assert mirror.sync(directory.path)["sent"] == 0
    assert on_server(server) == list(range(1, 31))
    assert all(
        file.with_name(file.name + ".synced").exists() for file in mirror.stored_files(directory)
    )


def test_sync_needs_a_key(directory: RunDirectory) -> None:
    with pytest.raises(UserError, match="wandb login"):
        mirror.sync(directory.path)
