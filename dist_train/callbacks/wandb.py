"""Weights & Biases as a mirror of metrics.jsonl (law 8). The only file that knows wandb.

The cursor is what the tracker itself holds, so no crash can make the two disagree: offline the
rows in its own files, online the server's last step. At a start every row of metrics.jsonl that
the tracker lacks is sent, and a row that it has (sent before a kill, computed again after the
resume) is not. All of it happens on a thread of its own: a tracker that is slow, full or gone
costs the run nothing but a warning.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import queue
import secrets
import string
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.callbacks import Callback
from dist_train.errors import UserError
from dist_train.run_directory import RunDirectory, scrub, write_file
from dist_train.yaml_text import read_yaml

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

MODES = ("online", "offline", "disabled")
START_SECONDS = 30.0
"""How long the tracker may take to start."""
FINISH_SECONDS = 60.0
"""How long a run waits at its end for the tracker to take the last rows."""

log = logging.getLogger(__name__)


class WandbMirror(Callback):
    """Mirror the run's rows and images in Weights & Biases.

    Args:
        mode: "online", "offline" or "disabled"; by default WANDB_MODE, else online. Online without
            a key is offline.
        entity, project, group, tags: as in `wandb.init`; by default WANDB_ENTITY, WANDB_PROJECT
            (else the recipe's project), WANDB_RUN_GROUP, WANDB_TAGS. WANDB_NAME, WANDB_RUN_ID,
            WANDB_DIR, WANDB_API_KEY and WANDB_BASE_URL count too.
    """

    priority = 95

    def __init__(
        self,
        mode: str | None = None,
        entity: str | None = None,
        project: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        if mode is not None and mode not in MODES:
            raise UserError(f"mode: {mode!r} is none of {', '.join(MODES)}")
        self.mode = mode
        self.options = {"entity": entity, "project": project, "group": group, "tags": tags}
        self._mirror: Mirror | None = None

    def configure(self, recipe: Recipe) -> None:
        _import_wandb()
        choose_mode(self.mode)

    def run_begins(self, run: Trainer) -> None:
        if run.world.is_main:
            self._mirror = Mirror(run.directory, choose_mode(self.mode), self.options)

    def logged(self, run: Trainer, row: dict[str, Any]) -> None:
        if self._mirror is not None:
            self._mirror.send(row)

    def run_ends(self, run: Trainer) -> None:
        self._finish(0)

    def failed(self, run: Trainer, error: BaseException) -> None:
        self._finish(1)

    def is_up_to_date(self) -> bool:
        """Whether the tracker was handed every row so far, or mirroring has ended."""
        return self._mirror is None or self._mirror.is_idle()

    def _finish(self, exit_code: int) -> None:
        if self._mirror is not None:
            self._mirror.finish(exit_code)
            self._mirror = None


class Mirror:
    """Brings a tracker up to metrics.jsonl, then sends row after row, on a thread of its own."""

    def __init__(self, directory: RunDirectory, mode: str, options: Mapping[str, Any]) -> None:
        self.directory, self.mode, self.options = directory, mode, options
        self.sent = 0
        self._given = self._done = 0
        self.error: BaseException | None = None
        self._rows: queue.SimpleQueue[dict[str, Any] | int] = queue.SimpleQueue()
        self._missing = directory.rows()
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        if self.mode == "offline":
            log.warning(
                "wandb: offline; `dist-train sync %s` sends this run to the server", directory.path
            )
        if self.mode != "disabled":
            self._thread.start()

    def send(self, row: Mapping[str, Any]) -> None:
        """Hand over a row of metrics.jsonl; returns at once."""
        if self.error is None and self.mode != "disabled":
            self._given += 1
            self._rows.put(dict(row))

    def is_idle(self) -> bool:
        """Whether every row was handed to the tracker, or mirroring has ended."""
        return self.error is not None or self.mode == "disabled" or self._done == self._given

    def finish(self, exit_code: int = 0) -> None:
        """Let the tracker take what is left, for a bounded time."""
        if self.mode == "disabled":
            return
        self._rows.put(exit_code)
        self._thread.join(START_SECONDS + FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"not finished after {START_SECONDS + FINISH_SECONDS:.0f} s"))

    def _work(self) -> None:
        try:
            tracker, has = self._start()
            for row in self._missing:
                self._log(tracker, row, has)
            while isinstance(handed := self._rows.get(), dict):
                self._log(tracker, handed, has)
                self._done += 1
            tracker.finish(exit_code=handed)
            if self.mode == "online":
                for file in stored_files(self.directory):
                    file.with_name(
                        file.name + ".synced"
                    ).touch()  # so that `wandb sync` leaves it alone
        except Exception as error:  # whatever a tracker throws, the run goes on
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        self.error = error
        log.warning(
            "wandb: %s: mirroring ends, metrics.jsonl goes on; `dist-train sync %s` catches up",
            str(error).strip().partition("\n")[0] or type(error).__name__,
            self.directory.path,
        )

    def _start(self) -> tuple[Any, Any]:
        """The tracker's run, and a function: does it have this step already?"""
        wandb = _import_wandb()
        earlier = stored_files(self.directory) if self.mode == "offline" else []
        steps = {row["step"] for file in earlier for row in seal(file)}
        settings = wandb.Settings(
            console="off",
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            reinit="create_new",
            disable_git=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        config = config_of(self.directory)
        project = (
            self.options["project"] or os.environ.get("WANDB_PROJECT") or config.get("project")
        )
        tracker = wandb.init(
            id=run_id(self.directory),
            name=os.environ.get("WANDB_NAME") or self.directory.path.name,
            dir=os.environ.get("WANDB_DIR") or str(self.directory.path.resolve()),
            config=config,
            mode=self.mode,
            resume="allow",
            settings=settings,
            **{**self.options, "project": project},
        )
        tracker.define_metric("step")
        tracker.define_metric("*", step_metric="step")
        first = tracker.starting_step
        return tracker, lambda step: step < first or step in steps

    def _log(self, tracker: Any, row: Mapping[str, Any], has: Any) -> None:
        if has(row["step"]):
            return
        tracker.log(self._values(row), step=row["step"], commit=True)
        self.sent += 1

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        wandb = _import_wandb()
        values: dict[str, Any] = {}
        for name, value in row.items():
            if name == "images":
                captions = row.get("captions", {})
                for image, path in value.items():
                    file = self.directory.path / path
                    if file.exists():
                        values[image] = wandb.Image(str(file), caption=captions.get(image))
            elif name.endswith("/nonfinite"):
                values[name.removesuffix("/nonfinite")] = float(value)
            elif name != "captions" and value is not None:
                values[name] = value
        return values


def sync(run_dir: Path | str) -> dict[str, Any]:
    """Bring the tracker up to date with a run directory's metrics.jsonl; needs a key.

    Returns `{"run_id", "rows", "sent"}`. Raises UserError without a key, or when the server cannot
    be reached.
    """
    directory = RunDirectory.open(run_dir)
    if not has_key():
        raise UserError("sync needs a key: run `wandb login`, or set WANDB_API_KEY")
    callbacks = config_of(directory).get("callbacks") or {}
    mine: dict[str, Any] = next(
        (c for key, c in callbacks.items() if c and c.get("name", key) == "wandb"), {}
    )
    options = {name: mine.get(name) for name in ("entity", "project", "group", "tags")}
    directory.lock()
    try:
        mirror = Mirror(directory, "online", options)
        mirror.finish()
    finally:
        directory.unlock()
    if mirror.error is not None:
        raise UserError(f"sync: wandb: {mirror.error}")
    return {"run_id": run_id(directory), "rows": len(directory.rows()), "sent": mirror.sent}


def choose_mode(mode: str | None) -> str:
    """The mode asked for, else WANDB_MODE, else online; offline where wandb would ask for a key."""
    chosen = mode or os.environ.get("WANDB_MODE") or "online"
    if chosen not in MODES:
        raise UserError(f"WANDB_MODE: {chosen!r} is none of {', '.join(MODES)}")
    if chosen == "online" and not has_key():
        return "offline"
    return chosen


def has_key() -> bool:
    """Whether wandb has credentials without asking anyone."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base_url = _import_wandb().setup().settings.base_url
    from wandb.sdk.lib.wbauth import read_netrc_auth

    return read_netrc_auth(host=base_url) is not None


def run_id(directory: RunDirectory) -> str:
    """This directory's one id at the tracker, for life: WANDB_RUN_ID at first, or a new one."""
    file = directory.path / "wandb" / "run_id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        letters = string.ascii_lowercase + string.digits
        fresh = "".join(secrets.choice(letters) for _ in range(8))
        write_file(file, (os.environ.get("WANDB_RUN_ID") or fresh).encode())
    return file.read_text(encoding="utf-8").strip()


def config_of(directory: RunDirectory) -> dict[str, Any]:
    """The resolved recipe, without secrets."""
    return scrub(read_yaml(directory.recipe.read_bytes(), str(directory.recipe)))


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("callbacks.wandb needs wandb: pip install 'dist-train[wandb]'") from error
    wandb.setup(settings=wandb.Settings(silent=True))
    return wandb


# ------------------------------------------------------------------------------------------------
# What an offline tracker has: its own files, a LevelDB log of protocol buffers

HEADER = b":W&B"
HEADER_BYTES, BLOCK_BYTES, CHUNK_BYTES = 7, 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def stored_files(directory: RunDirectory) -> list[Path]:
    """The tracker's local files of this run, oldest start first."""
    root = Path(os.environ.get("WANDB_DIR") or directory.path) / "wandb"
    return sorted(root.glob(f"*run-*/run-{run_id(directory)}.wandb"))


def history(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `.wandb` file, or of all below a folder; a torn tail is ignored."""
    path = Path(path)
    files = sorted(path.rglob("*.wandb")) if path.is_dir() else [path]
    return [row for file in files for row in _history(_records(file.read_bytes()))]


def seal(file: Path) -> list[dict[str, Any]]:
    """Cut a file of an earlier start to its whole records, for good, and return its rows.

    The tracker's process outlives a killed run by a moment and may still be writing: it keeps the
    old file, which nobody sees any more, so what is read here is what stays.
    """
    content = file.read_bytes()
    records = list(_records(content))
    end = records[-1][1] if records else HEADER_BYTES
    write_file(file, content[:end])
    return _history(iter(records))


def _history(records: Iterator[tuple[bytes, int]]) -> list[dict[str, Any]]:
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for data, _ in records:
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                place = row
                for part in outer:
                    place = place.setdefault(part, {})
                place[name] = json.loads(item.value_json)
            rows.append(row)
    return rows


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """(record, offset of its end) of every whole record before the first damage."""
    if content[:4] != HEADER:
        return
    offset, parts = HEADER_BYTES, io.BytesIO()
    while True:
        left = BLOCK_BYTES - offset % BLOCK_BYTES
        if left < CHUNK_BYTES:
            offset += left
            continue
        if offset + CHUNK_BYTES > len(content):
            return
        checksum, length, kind = struct.unpack_from("<IHB", content, offset)
        data = content[offset + CHUNK_BYTES : offset + CHUNK_BYTES + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(data) < length:
            return
        if zlib.crc32(bytes([kind]) + data) != checksum:
            return
        offset += CHUNK_BYTES + length
        if kind in (FULL, FIRST):
            parts = io.BytesIO()
        parts.write(data)
        if kind in (FULL, LAST):
            yield parts.getvalue(), offset
