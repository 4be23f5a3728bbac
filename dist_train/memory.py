"""What an objective keeps from step to step: one memory a slot, wherever the slot is (law 11)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from dist_train.engine import Slice
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.checkpoint import Reader
    from dist_train.data_shards.loader import MicroBatch


class SlotMemory:
    """`micro.memory` of this rank's slots. A slot is the index of a micro-batch in its step: there are as many on any
    number of ranks, so an image pool or the state of a recurrent network moves with its slot."""

    def __init__(self, slots: range, device: str) -> None:
        self.device = device
        self._slots: dict[int, dict[str, Tensor]] = {slot: {} for slot in slots}

    @property
    def is_empty(self) -> bool:
        """Whether no objective keeps anything, on any rank: all have slots, and treat them alike."""
        return not any(self._slots.values())

    def lend(self, micro: MicroBatch) -> None:
        """Put the memory of its slot into a micro-batch."""
        micro.memory = self._slots[micro.index]

    def check(self, micro: MicroBatch) -> None:
        """Refuse what would keep a whole step's graph alive, or could not be saved."""
        for name, value in micro.memory.items():
            if not isinstance(value, Tensor) or value.requires_grad:
                what = "a tensor with a graph" if isinstance(value, Tensor) else repr(value)
                raise UserError(
                    f"objective: micro.memory['{name}'] is {what}, expected a tensor without one (.detach())"
                )

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Every tensor, as checkpoints name it: `memory/00003/pool`."""
        for slot, memory in self._slots.items():
            for name, tensor in memory.items():
                full = f"memory/{slot:05d}/{name}"
                yield full, Slice(full, tuple(tensor.shape), 0, tensor.contiguous().view(-1))

    def load(self, reader: Reader) -> None:
        """Take the memories of this rank's slots, whoever wrote them."""
        for slot, memory in self._slots.items():
            memory.clear()
            prefix = f"memory/{slot:05d}/"
            for full in reader.names(prefix):
                memory[full.removeprefix(prefix)] = reader.whole(full).to(self.device)
