"""Who takes part in a run: the ranks, their device, what they tell each other, and how this machine's are started."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dist_train.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(seconds=float(os.environ.get("DIST_TRAIN_TIMEOUT", "600")))
"""How long a rank waits in a collective for the others before it fails. Never torch's 30 minutes."""


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, environ: Mapping[str, str] = os.environ, *, group: bool = False) -> World:
        """Take the place that the launcher (torchrun, accelerate, deepspeed, ours) gave in RANK, WORLD_SIZE, ....

        Without those variables this process is the whole world. `group` asks for a process group even then (DeepSpeed
        cannot do without one).
        """
        import torch
        import torch.distributed as dist

        rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        local_rank = int(environ.get("LOCAL_RANK", rank))
        local_size = int(
            environ.get("LOCAL_WORLD_SIZE", environ.get("DIST_TRAIN_LOCAL_SIZE", size))
        )
        if torch.cuda.is_available():
            device = f"cuda:{local_rank % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        else:
            device = "cpu"
        if (size > 1 or group) and not dist.is_initialized():
            rendezvous = environ.get("DIST_TRAIN_RENDEZVOUS")
            store: dist.Store | None = None  # None: by MASTER_ADDR and MASTER_PORT
            if rendezvous:
                store = dist.FileStore(rendezvous, size)
            elif size == 1:
                store = dist.HashStore()
            if device == "cpu" and (rendezvous or environ.get("MASTER_ADDR") in LOOPBACK):
                os.environ.setdefault(
                    "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
                )
            dist.init_process_group(
                "nccl" if device.startswith("cuda") else "gloo",
                store=store,
                rank=rank if store is not None else -1,
                world_size=size if store is not None else -1,
                timeout=COLLECTIVE_TIMEOUT,
            )
        return cls(rank, size, local_rank, local_size, device)

    def leave(self) -> None:
        """End this process's part in the process group, if there is one."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def sum_(self, tensor: Any) -> Any:
        """Add `tensor` up over all ranks, in place; returns it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Any, source: int = 0) -> Any:
        """Overwrite `tensor` with that of rank `source`, in place; returns it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank, on every rank (no pickle crosses the wire)."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(message)
        dist.all_reduce(sizes)
        lengths = sizes.tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [
            json.loads(bytes(part[:length].cpu().numpy()))
            for part, length in zip(parts, lengths, strict=True)
        ]

    def agree(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            import torch

            self.sum_(torch.zeros(1, device=self.device))


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def threads_a_rank(setting: str | int, local_size: int) -> int:
    """How many threads each of `local_size` ranks of this machine takes: as set, or its share of the cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // local_size) if setting == "auto" else int(setting)


def pin_threads(setting: str | int, local_size: int) -> int:
    """Give this rank its share of the machine's cores; the same number of threads is part of "bit for bit"."""
    import torch

    threads = threads_a_rank(setting, local_size)
    torch.set_num_threads(threads)
    return threads


# ---------------------------------------------------------------------------------------------------------------------
# Starting the ranks of this machine


class RankFailed(RuntimeError):
    """A rank ended badly. The message holds the first failure's rank and traceback."""


def start_ranks(
    count: int,
    target: Callable[..., Any],
    *arguments: Any,
    environ: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> list[Any]:
    """Run `target(*arguments)` in `count` new processes that form one world; return what each returned (JSON values).

    On a machine without GPUs they fork from a server that has imported torch and deepspeed once, so a start costs
    little. When one fails, the others are ended, and its traceback is raised. No rank outlives this process.
    """
    context = multiprocessing.get_context("forkserver")
    # a process cannot use CUDA if it forks from one that has asked for it, as importing DeepSpeed does
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    context.set_forkserver_preload([] if has_gpu else ["dist_train.preload"])
    with tempfile.TemporaryDirectory(prefix="dist-train-") as scratch:
        ranks = [
            context.Process(
                target=_run_rank,
                args=(
                    rank,
                    count,
                    scratch,
                    dict(os.environ) | dict(environ or {}),
                    target,
                    arguments,
                ),
                name=f"rank-{rank}",
            )
            for rank in range(count)
        ]
        try:
            with _main_left_out(target):
                for process in ranks:
                    process.start()
            _await(ranks, Path(scratch), timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
            for process in ranks:
                if process.pid is not None:
                    process.join()
        return [
            json.loads((Path(scratch) / f"result-{rank}.json").read_text()) for rank in range(count)
        ]


@contextmanager
def _main_left_out(target: Callable[..., Any]) -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in every rank, which only a target in it would need:
    so no script wants an `if __name__ == "__main__"`, and standard input and notebooks work."""
    main = sys.modules["__main__"]
    if target.__module__ != "__main__":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _await(ranks: list[Any], scratch: Path, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    running = {process.sentinel: process for process in ranks}
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait(list(running), timeout=left)
        if not ended:
            names = ", ".join(process.name for process in running.values())
            raise RankFailed(f"{names} still running after {timeout:.0f} s: ended")
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                raise _failure(process, ranks, scratch)


def _failure(process: Any, ranks: list[Any], scratch: Path) -> Exception:
    """The first failure: a rank that a signal ended (what the others then report is that they lost it), else the
    earliest traceback on disk, else an exit code."""
    time.sleep(0.2)  # let a rank that failed at the same moment write its own traceback
    reports = [
        json.loads(path.read_text())
        for path in sorted(scratch.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    ]
    for report in reports:
        if report["user_error"]:
            return UserError(report["message"])
    for rank in [process, *ranks]:
        if rank.exitcode is not None and rank.exitcode < 0:
            name = signal.Signals(-rank.exitcode).name
            hints = {"SIGKILL": " (out of memory?)", "SIGALRM": " (it hung: see logs/hang.txt)"}
            hint = hints.get(name, "")
            return RankFailed(f"{rank.name} was ended by {name}{hint}")
    if reports:
        return RankFailed(f"{reports[0]['rank']} failed:\n{reports[0]['traceback']}")
    return RankFailed(f"{process.name} ended with exit code {process.exitcode}")


def _run_rank(
    rank: int,
    count: int,
    scratch: str,
    environ: dict[str, str],
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        DIST_TRAIN_RENDEZVOUS=str(Path(scratch) / "rendezvous"),
    )
    try:
        result = target(*arguments)
        (Path(scratch) / f"result-{rank}.json").write_text(json.dumps(result))
    except BaseException as error:
        report = {
            "rank": f"rank-{rank}",
            "user_error": isinstance(error, UserError),
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        part = Path(scratch) / f"part-{rank}.json"
        part.write_text(json.dumps(report))
        part.rename(Path(scratch) / f"failure-{rank}.json")
        sys.stdout.flush()
        os._exit(1)  # at once: the others may be waiting in a collective for us


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
