"""Callbacks observe and decide; the engine acts (law 10).

The loop, with each hook in its place:

    configure(recipe)                                # before anything is built
    run_begins(run)
    for step, batch in data:
        step_begins(run)                             # schedules set their scalars
        for turn in objective.turns(step):
            ... forward and backward of every micro-batch ...
            gradients_ready(run, turn)               # clipping is decided here
            ... the engine clips, updates, gathers ...
            turn_ends(run, turn)                         # averages take the new weights
        step_ends(run)                               # log, evaluate, sample, save, stop
            evaluation_batch(run, outputs, micro)    # within an evaluation, once a batch
            evaluated(run, results)                  # after it
            logged(run, row)                         # rank 0 only: this step's row is on disk
    run_ends(run)
    failed(run, error)                               # instead of run_ends, when an error ends the run

Every hook but `logged` runs on all ranks, so a hook may use collectives as long as it does so on every rank. After an
interruption a step that was cut short begins again, and a `step_ends` that asked `run.leave_if_told()` is called again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dist_train.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.data_shards.loader import MicroBatch
    from dist_train.engine import Slice
    from dist_train.objectives import Turn
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


Hook = Callable[..., None]


class Callback:
    """What is not fetch, backward or step. Override the hooks you need.

    A public method that takes a `run` but is no hook is refused when the class is made: it would never be called.
    """

    priority = 50
    """Callbacks run in the order of this number, low first; 80 writes the row, 90 saves the checkpoint."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, method in vars(cls).items():
            if name.startswith("_") or hasattr(Callback, name) or not inspect.isfunction(method):
                continue
            if "run" in inspect.signature(method).parameters:
                hooks = [hook for hook in vars(Callback) if not hook.startswith("_")]
                raise TypeError(
                    f"{cls.__name__}.{name}: there is no such hook{nearest(name, hooks)}"
                    " (begin its name with _ if you call it yourself)"
                )

    def configure(self, recipe: Recipe) -> None: ...
    def run_begins(self, run: Trainer) -> None: ...
    def step_begins(self, run: Trainer) -> None: ...
    def gradients_ready(self, run: Trainer, turn: Turn) -> None: ...
    def turn_ends(self, run: Trainer, turn: Turn) -> None: ...
    def step_ends(self, run: Trainer) -> None: ...
    def logged(self, run: Trainer, row: dict[str, Any]) -> None: ...
    def evaluation_batch(
        self, run: Trainer, outputs: dict[str, Tensor], micro: MicroBatch
    ) -> None: ...
    def evaluated(self, run: Trainer, results: dict[str, float]) -> None: ...
    def failed(self, run: Trainer, error: BaseException) -> None: ...
    def run_ends(self, run: Trainer) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as JSON values, the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def slices(self) -> Iterable[tuple[str, Slice]]:
        """Tensors that must survive a restart, by name; from `run_begins` on. A resume overwrites their storage."""
        return ()

    def kept(self) -> Iterable[int]:
        """The steps whose checkpoints are never deleted, and the present one where it is to be saved; the same on every
        rank."""
        return ()

    def weights(self, run: Trainer) -> dict[str, dict[str, Tensor]]:
        """Whole weights by player, for `evaluate: {weights: INSTANCE}` (collective); only averages have them."""
        raise TypeError(f"{type(self).__name__} keeps no weights")


class Callbacks:
    """The callbacks of a run by instance name, called in order of priority."""

    def __init__(self, instances: Mapping[str, Callback]) -> None:
        self.by_name = dict(sorted(instances.items(), key=lambda item: item[1].priority))

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.by_name.values())

    def of(self, hook: str) -> dict[str, Hook]:
        """That hook of each callback that has it, by instance name."""
        empty = getattr(Callback, hook)
        methods = {name: getattr(callback, hook) for name, callback in self.by_name.items()}
        return {
            name: method
            for name, method in methods.items()
            if getattr(method, "__func__", None) is not empty
        }

    def call(self, hook: str, *arguments: Any) -> None:
        """Call one hook of every callback."""
        for method in self.of(hook).values():
            method(*arguments)
