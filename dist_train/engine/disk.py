"""Tensors that lie in files: in memory as far as there is room, on an NVMe disk for the rest (docs/decisions/0057).

A tensor is a file mapped into memory, so it is used like any other. The operating system writes it out where memory is
short, and reads what is touched. The file has no name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dist_train.errors import UserError


class Disk:
    """Room for tensors in a folder.

    Args:
        folder: on a local disk, one for all processes of a machine.
    Raises: UserError where nothing can be written there; `moved` raises it where there is no room.
    """

    def __init__(self, folder: str, where: str = "strategy.nvme_path") -> None:
        self._folder, self._where = Path(folder), where
        if not self._folder.is_dir():
            raise UserError(
                f"{where}: {folder} is no folder on this machine; make it, on its NVMe disk"
            )
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise UserError(f"{where}: {folder} cannot be written to by this user")

    @torch.no_grad()
    def moved(self, tensor: Tensor) -> Tensor:
        """The same values in a file; room for it is taken at once, so that no later write can lack it."""
        if not tensor.numel():
            return tensor
        if tensor.nbytes > shutil.disk_usage(self._folder).free:
            raise self._no_room(tensor)
        handle, name = tempfile.mkstemp(prefix="dist-train-", dir=self._folder)
        try:
            os.posix_fallocate(handle, 0, tensor.nbytes)
            there = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:  # other ranks take of the same room
            raise self._no_room(tensor) from error
        finally:
            os.unlink(name)
            os.close(handle)
        return there.copy_(tensor.flatten()).view(tensor.shape)

    def _no_room(self, tensor: Tensor) -> UserError:
        return UserError(
            f"{self._where}: {self._folder} has no room for {tensor.nbytes:,} bytes more of the optimiser's state"
        )
