"""Launchers in processes of their own, for tests that kill them, and their ranks. Nothing here needs torch, so that
all starts at once. Ranks import this file by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from dist_train.ranks import start_ranks


def launcher(target: Callable[..., Any], *arguments: Any) -> None:
    """Two ranks, from a fork server that imports less than it otherwise would."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["dist_train.ranks.fork_server"]
    )
    forkserver.ensure_running()
    start_ranks(2, target, *arguments)


def hang(fifo: str) -> None:
    """Tell that this rank is there, and never return."""
    with open(fifo, "a") as file:
        file.write(f"{os.getpid()}\n")
    threading.Event().wait()


def with_children(folder: str, how: str) -> None:
    """Every rank starts a child that ignores what can be ignored, tells both ids, and hangs; one may stop or die."""
    script = (
        "import signal,time\nfor n in (1,2,15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-S", "-c", script])
    rank = os.environ["RANK"]
    part = Path(folder) / f".{rank}"
    part.write_text(f"{os.getpid()} {child.pid}")
    part.rename(Path(folder) / f"pids-{rank}")
    if rank == "1" and how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == "1" and how == "kill":
        while len(list(Path(folder).glob("pids-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
