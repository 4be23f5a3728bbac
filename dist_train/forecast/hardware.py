"""What named GPUs can do: the makers' figures, dense, without sparsity. Add a row, or give flags to `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU.

    Attributes:
        fp32, tf32, half: TFLOP/s of dense matrix products in fp32, TF32, and bf16 or fp16.
        memory: GiB. bandwidth: GB/s of its own memory.
        link: GB/s to the GPUs of its node, one way. network: GB/s to other nodes, a GPU, one way.
        workspaces: MiB that torch gives to cuBLAS and cuBLASLt: 32 each from Hopper on, 8 and 4 before.
    """

    name: str
    fp32: float
    tf32: float
    half: float
    memory: float
    bandwidth: float
    link: float
    network: float
    workspaces: int = 12

    def flops_per_second(self, precision: str, tf32: bool = False) -> float:
        fast = self.tf32 if tf32 else self.fp32
        return 1e12 * (fast if precision == "fp32" else self.half)


DEVICES = {
    device.name: device
    for device in (
        # name            fp32  tf32   half  GiB   GB/s  link  network  workspaces
        Device("b200", 75, 1125, 2250, 180, 7700, 900, 50, 64),
        Device("h200", 67, 494, 989, 141, 4800, 450, 50, 64),
        Device("h100", 67, 494, 989, 80, 3350, 450, 50, 64),
        Device("a100-80g", 19.5, 156, 312, 80, 2039, 300, 25),
        Device("a100", 19.5, 156, 312, 40, 1555, 300, 25),
        Device("v100", 15.7, 15.7, 125, 32, 900, 150, 12.5),
        Device("l40s", 91.6, 183, 362, 48, 864, 32, 12.5),
        Device("a10", 31.2, 62.5, 125, 24, 600, 32, 12.5),
        Device("l4", 30.3, 60, 121, 24, 300, 32, 12.5),
        Device("t4", 8.1, 8.1, 65, 16, 320, 16, 6.25),
        Device("rtx4090", 82.6, 82.6, 165, 24, 1008, 32, 12.5),
        Device("mi300x", 163.4, 654, 1307, 192, 5300, 448, 50),
    )
}


def device(name: str) -> Device:
    """The device of this name; UserError with the nearest one."""
    if name not in DEVICES:
        raise UserError(
            f"--gpu {name}: not known{nearest(name, DEVICES)} (there are {', '.join(DEVICES)};"
            " for others `plan` takes --tflops, --memory and --bandwidth)"
        )
    return DEVICES[name]


def device_like(reported: str) -> Device | None:
    """The device that a driver reports as "NVIDIA H100 80GB HBM3", or None: an L40 is no L4, an A10G no A10."""
    words = reported.lower().replace("rtx ", "rtx").replace("-", " ").split()
    for name in sorted(DEVICES, key=len, reverse=True):
        model, _, size = name.partition("-")
        if (model in words or f"g{model}" in words) and (not size or f"{size}b" in words):
            return DEVICES[name]
    return None
