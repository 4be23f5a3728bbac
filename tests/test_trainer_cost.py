"""What the trainer adds to a bare loop, in torch operations a step: a number that no busy machine changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import trainer as benchmark
from dist_train.world import pin_threads

STEPS = 20


class Count(TorchDispatchMode):
    """How often each operation is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function.namespace == "aten":  # not the marks that profilers read
            self.operations[str(function)] += 1
        return function(*arguments, **(keywords or {}))


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """What 20 steps with console, journal, clipping, decay and ema dispatch beyond those of the bare loop."""
    pin_threads(1, 1)
    width, depth, _ = benchmark.SIZES["tiny"]
    folder = tmp_path_factory.mktemp("cost")
    trainer = benchmark.make_trainer(folder, benchmark.MLP(width, depth), STEPS)
    bare = benchmark.bare_loop(benchmark.MLP(width, depth), trainer.data.micro, STEPS)
    trainer.train(until=STEPS)  # what is made once is made
    bare()
    with Count() as ours:
        trainer.train(until=2 * STEPS)
    with Count() as theirs:
        bare()
    difference = Counter(ours.operations)
    difference.subtract(theirs.operations)
    return Counter({name: count for name, count in difference.items() if count})


def test_operations_that_the_trainer_adds(added: Counter[str]) -> None:
    """The loss's two detached copies, norm, clipping by it and the average: 8 a step; and 2 a row, each 10 steps."""
    assert sum(added.values()) <= 8.2 * STEPS, dict(added)


def test_nothing_waits_for_the_device_but_a_row(added: Counter[str]) -> None:
    """A host sync is an `_local_scalar_dense` (`.item()`, `bool`), or a copy to the host, once a row."""
    assert added["aten._local_scalar_dense.default"] == 0
    assert added["aten._to_copy.default"] <= STEPS / 10


def test_updates_are_one_kernel_a_group(added: Counter[str]) -> None:
    assert added["aten._fused_adamw_.default"] == 0  # as many as the bare loop's


def test_a_plain_loop_has_the_operations_that_it_must(tmp_path: Path) -> None:
    """The counter counts: a linear layer forward and backward is so many operations, not none."""
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    with Count() as count:
        layer(x).sum().backward()
    assert count.operations["aten.addmm.default"] == 1
    assert sum(count.operations.values()) >= 6
