"""Networks that are built without their weights, which are made one by one when they are asked for.

    network = construct(lambda: Transformer(...), "cpu", "model")
    for parameter in network.parameters():
        keep_own_slice(value_of(parameter))

Within the block every new tensor is fake, with a shape and no values, and what is done to it is noted. A draw is made
all the same, into a scratch tensor, so that the generator goes on as ever. To make a weight, what was done to it is
done again, each draw from the generator as it then was: its values are those of an ordinary construction, bit for bit,
wherever in the network's constructor they come from, and no more is ever there than one weight and what it was made of.
(The meta device alone would not do: some functions of `torch.nn.init` leave its tensors as they are.)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from dist_train.errors import UserError

aten: Any = torch.ops.aten
DRAWS = frozenset(
    {
        aten.bernoulli_.float,
        aten.cauchy_.default,
        aten.exponential_.default,
        aten.geometric_.default,
        aten.log_normal_.default,
        aten.normal_.default,
        aten.rand.default,
        aten.randint.default,
        aten.randint.low,
        aten.randn.default,
        aten.random_.default,
        getattr(aten.random_, "from"),
        aten.random_.to,
        aten.randn_like.default,
        aten.rand_like.default,
        aten.randperm.default,
        aten.uniform_.default,
    }
)
"""What draws a number of values that depends on the shape alone."""


class Undeferrable(Exception):
    """The network's construction cannot be put off: it looks at values, or draws by them."""


def construct(build: Callable[[], nn.Module], device: str, where: str) -> nn.Module:
    """Build a network whose weights are not there yet; or whole, with a warning, where its constructor needs values.

    Args:
        device: where its weights will be. where: what the warning calls it.
    """
    later = Deferred()
    before = torch.get_rng_state()
    try:
        with later, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            network = build()
        later.release(network, device)
        return network
    except UserError:
        raise
    except Exception as error:  # a constructor that lacks values fails in its own way
        logging.getLogger("dist_train").warning(
            "%s is built whole on every rank: without values its constructor fails (%s: %s)",
            where,
            type(error).__name__,
            error,
        )
    torch.set_rng_state(before)
    return build()


@dataclass
class Operation:
    """What was done: a function of tensors, some of which it changed, and the generator before it drew."""

    function: Any
    arguments: Any  # (args, kwargs)
    results: list[Tensor]
    generator: torch.Generator | None
    state: Tensor | None


class Deferred(TorchDispatchMode):
    """Notes how tensors are made instead of making them."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._operations: list[Operation] = []
        # of a storage: the operations that made or changed it
        self._changes: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = _tensors((args, kwargs))
        if inputs and not any(map(_is_fake, inputs)):
            return func(*args, **kwargs)  # of tensors that are there, like those made of a list
        changed = _changed(func, args, kwargs)
        if func is aten._local_scalar_dense.default or not all(map(_is_fake, changed)):
            values = tree_map(self._value_if_deferred, (args, kwargs))
            return func(*values[0], **values[1])
        generator = state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            state = generator.get_state()
            _draw(func, args, kwargs)
        try:
            with self._fake:
                results = func(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            raise Undeferrable(f"{func} has no result without values") from error
        outputs = _tensors(results)
        known = {_storage(tensor) for tensor in inputs}
        touched = [t for t in outputs if _storage(t) not in known] + changed
        if touched:  # else it is a view
            arguments = tree_map(_kept, (args, kwargs))
            for storage in {_storage(tensor) for tensor in touched}:
                self._changes.setdefault(storage, []).append(len(self._operations))
            kept = [_kept(output) for output in outputs]
            self._operations.append(Operation(func, arguments, kept, generator, state))
        return results

    def release(self, network: nn.Module, device: str) -> None:
        """Make the network's buffers, and give each parameter room for one number and a `value_of`."""
        for module in network.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and _is_fake(buffer):
                    module._buffers[name] = self.value(buffer)
        # tied ones stay one
        made: dict[int, nn.Parameter] = {}
        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or not _is_fake(parameter):
                    continue
                if id(parameter) not in made:
                    room = torch.empty(1, dtype=parameter.dtype, device=device)
                    new = nn.Parameter(room.expand(parameter.shape), parameter.requires_grad)
                    _makers[new] = lambda parameter=parameter: self.value(parameter)
                    made[id(parameter)] = new
                setattr(module, name, made[id(parameter)])

    @torch.no_grad()
    def value(self, tensor: Tensor) -> Tensor:
        """What a fake tensor stands for."""
        needed: set[int] = set()
        seen: set[int] = set()
        waiting = [_storage(tensor)]
        while waiting:
            storage = waiting.pop()
            if storage in seen:
                continue
            seen.add(storage)
            for index in self._changes.get(storage, []):
                if index not in needed:
                    needed.add(index)
                    inputs = _tensors(self._operations[index].arguments)
                    waiting += [_storage(one) for one in inputs if _is_fake(one)]
        there: dict[int, Any] = {}
        for index in sorted(needed):
            _repeat(self._operations[index], there)
        found = _view(tensor, there)
        whole = found.untyped_storage().nbytes() == found.numel() * found.element_size()
        return found if whole else found.clone()

    def _value_if_deferred(self, value: Any) -> Any:
        return self.value(value) if _is_fake(value) else value


def value_of(parameter: nn.Parameter) -> Tensor | None:
    """The starting value of a parameter of a released network; None of one that is there already."""
    make = _makers.get(parameter)
    return None if make is None else make()


_makers: Any = WeakTensorKeyDictionary()


def _repeat(operation: Operation, there: dict[int, Any]) -> None:
    """Do it to the storages `there`, by those of the fake tensors, and add what it makes."""

    def real(value: Any) -> Any:
        return _view(value, there) if _is_fake(value) else value

    args, kwargs = tree_map(real, operation.arguments)
    if operation.generator is None:
        made = operation.function(*args, **kwargs)
    else:
        before = operation.generator.get_state()
        assert operation.state is not None
        operation.generator.set_state(operation.state)
        made = operation.function(*args, **kwargs)
        operation.generator.set_state(before)
    for fake, result in zip(operation.results, _tensors(made), strict=True):
        if _storage(fake) not in there:
            if result.stride() != fake.stride() or result.storage_offset():
                result = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).copy_(
                    result
                )
            there[_storage(fake)] = result.untyped_storage()


def _view(fake: Tensor, there: dict[int, Any]) -> Tensor:
    empty = torch.empty(0, dtype=fake.dtype)
    return empty.set_(there[_storage(fake)], fake.storage_offset(), fake.shape, fake.stride())


def _draw(func: Any, args: Any, kwargs: Any) -> None:
    """Take from the generator what the function takes."""
    if func not in DRAWS:
        raise Undeferrable(f"{func} draws by values")

    def scratch(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return value

    args, kwargs = tree_map(scratch, (args, kwargs))
    func(*args, **kwargs)


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that the function writes to."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += _tensors(value)
    return written


def _kept(value: Any) -> Any:
    """As it is now: before the operation is repeated a tensor that is there may change, a fake one its shape (`t_`)."""
    if not isinstance(value, Tensor):
        return value
    return value.detach() if _is_fake(value) else value.clone()


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
