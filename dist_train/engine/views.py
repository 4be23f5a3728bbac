"""What a turn sees of a player's networks: live, as frozen views, or in evaluation mode (law 5)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.engine.layers import Layers, Shards, read_through, regathered
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.batch_norm import statistics_of_the_batch
from dist_train.networks.blocks import compile_like


class Views:
    """Functions of a player's networks and of weights that are passed in, so that no hook of an engine ever fires.

    Args:
        gather: gives the present weights by name, whole; asked once a turn at most.
        trained: the names of the weights that the player's own turn differentiates.

    A player that `gather_by_layer` was told of gathers each weight when a forward or backward comes to it: then all
    ranks have to call the networks of a turn alike.
    """

    def __init__(
        self,
        player: Player,
        buffers: dict[str, Tensor],
        trained: Iterable[str],
        gather: Callable[[], dict[str, Tensor]],
    ) -> None:
        self._skeleton, self._evaluation = player.skeleton(), player.skeleton().eval()
        self._aliases = _aliases(player)
        self._buffers, self._trained, self._gather = buffers, list(trained), gather
        self._frozen = _Frozen(player, self._aliases, buffers)
        self._layers: dict[str, Layers] = {}  # by who sees the networks
        self._readers: dict[str, Player] = {}
        self.forget()

    def gather_by_layer(self, shards: Shards, budget: int) -> None:
        """Gather weights when they are used, and keep at most `budget` elements of them."""
        self._layers = {
            "given": Layers(shards, budget, self._trained),
            "frozen": Layers(shards, budget),
        }

    @property
    def by_layer(self) -> bool:
        return bool(self._layers)

    def forget(self) -> None:
        """The weights have changed."""
        self._weights: dict[str, Tensor] | None = None
        self._leaves: dict[str, Tensor] | None = None
        self._frozen.release()
        for layers in self._layers.values():
            layers.forget()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The present weights by name, whole and detached."""
        if self._weights is None:
            self._weights = self._gather()
        return self._weights

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The trained weights as leaves, by whose gradients this player's `given` turn goes; by layer they are this
        rank's slices, and their gradients summed over the ranks already (but for weights that every rank has)."""
        if self.by_layer:
            self._layers["given"].begin()
            return self._layers["given"].leaves
        if self._leaves is None:
            self._leaves = {n: self.weights[n].detach().requires_grad_() for n in self._trained}
        return self._leaves

    def given(self, network: str) -> Callable[..., Any]:
        """The network as its own turn sees it where gradients are given: of the leaves, and changing the buffers."""
        if self.by_layer:
            self._layers["frozen"].drop()
            self._layers["given"].begin()
            return self._read("given", network, self._buffers)
        return self._call(self._skeleton, network, {**self.weights, **self.leaves, **self._buffers})

    def frozen(self, network: str) -> Callable[..., Any]:
        """The network as other players' turns see it: gradients flow through it to its input, nothing reaches or
        changes the network (running statistics are copies)."""
        if self.by_layer:
            buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
            return self._read("frozen", network, buffers)
        if not self._frozen.holds:
            self._frozen.hold(self.weights)
        return self._frozen.call(network)

    def loss_context(self) -> contextlib.AbstractContextManager[Any]:
        """In which the loss of this player's `given` turn is to be computed."""
        return regathered() if self.by_layer else contextlib.nullcontext()

    def observed(
        self, network: str, seen: Callable[[str, Any], None], *, evaluating: bool = False
    ) -> Callable[..., Any]:
        """The network as its own turn sees it, of leaves and changing nothing, or in evaluation mode; `seen(layer,
        output)` is told what every layer with a weight puts out, in the order of the forward."""
        skeleton = self._evaluation if evaluating else self._skeleton
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        leaves = {name: self.weights[name].detach().requires_grad_() for name in self._trained}
        call = self._call(skeleton, network, {**self.weights, **leaves, **buffers})
        layers = {
            f"{network}.{name}" if name else network: module
            for name, module in skeleton.networks[network].named_modules()
            if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        }

        def watched(*inputs: Any) -> Any:
            handles = [
                module.register_forward_hook(lambda _, __, output, name=name: seen(name, output))
                for name, module in layers.items()
            ]
            try:
                return call(*inputs)
            finally:
                for handle in handles:
                    handle.remove()

        return watched

    def training(
        self, network: str, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        """The network in training mode, of weights and buffers that are passed in: a forward changes those buffers, and
        running statistics become those of its batch alone."""
        call = self._call(self._skeleton, network, {**weights, **buffers})

        def noting(*inputs: Any) -> Any:
            with statistics_of_the_batch(self._skeleton.networks[network]):
                return call(*inputs)

        return noting

    def evaluated(
        self, network: str, weights: Mapping[str, Tensor] | None = None
    ) -> Callable[..., Any]:
        """The network in evaluation mode, with the present weights or those given (names as in `full_weights`)."""
        source = self.weights if weights is None else weights
        return self._call(self._evaluation, network, {**self._buffers, **source})

    def _read(self, who: str, network: str, buffers: Mapping[str, Tensor]) -> Callable[..., Any]:
        """A network that gathers its weights itself."""
        if who not in self._readers:
            self._readers[who] = self._skeleton.skeleton()
            read_through(self._readers[who], self._aliases, self._layers[who])
        call = self._call(self._readers[who], network, buffers)

        def regathering(*inputs: Any) -> Any:
            with regathered():
                return call(*inputs)

        return regathering

    def _call(
        self, skeleton: Player, network: str, by_name: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        tensors = {alias: by_name[n] for alias, n in self._aliases.items() if n in by_name}

        def call(*inputs: Any) -> Any:
            return torch.func.functional_call(skeleton, tensors, (network, *inputs))

        return call


class _Frozen:
    """A copy of the networks that holds others' weights for a turn: no hook, no gradient and no change of a buffer
    reaches those. Its own copies of the buffers stay where they are, as CUDA graphs want it."""

    def __init__(
        self, player: Player, aliases: Mapping[str, str], buffers: Mapping[str, Tensor]
    ) -> None:
        self._player = player.skeleton()
        compile_like(self._player, player, player.cuda_graphs)
        self._slots = [(*_slot(self._player, path), name) for path, name in aliases.items()]
        self._hollow = [table[key] for table, key, _ in self._slots]
        self._copies = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
        self._pairs = {
            network: _by_type(
                (self._copies[name], buffers[name])
                for path, name in aliases.items()
                if path.startswith(f"networks.{network}.") and name in buffers
            )
            for network in player.networks
        }
        self.holds = False

    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, until `release`."""
        for table, key, name in self._slots:
            table[key] = self._copies[name] if name in self._copies else weights[name]
        self.holds = True

    def release(self) -> None:
        if self.holds:
            for (table, key, _), hollow in zip(self._slots, self._hollow, strict=True):
                table[key] = hollow
            self.holds = False

    @torch.no_grad()
    def call(self, network: str) -> Callable[..., Any]:
        """A network, with the buffers as they are now."""
        for copies, present in self._pairs[network]:
            torch._foreach_copy_(copies, present)
        return functools.partial(self._player, network)


def _by_type(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Two lists of each type, which one kernel copies."""
    found: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for copy, present in pairs:
        copies, presents = found.setdefault(copy.dtype, ([], []))
        copies.append(copy)
        presents.append(present)
    return list(found.values())


def _slot(player: Player, path: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps the parameter or buffer of this path."""
    owner, _, leaf = path.rpartition(".")
    module = player.get_submodule(owner)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def single_backward(live: Callable[..., Any]) -> Callable[..., Any]:
    """A live network that refuses a double backward, whose gradients a hook would get wrong."""

    def call(*inputs: Any) -> Any:
        output = live(*inputs)
        _for_each_tensor(output, _refuse_double_backward)
        return output

    return call


def plain_name(name: str) -> str:
    """A player's name for a tensor: `net.0.weight`."""
    return name.removeprefix("networks.")


def _aliases(player: Player) -> dict[str, str]:
    """{every path to a parameter or buffer: its one name}; a tied tensor has several paths."""
    names: dict[int, str] = {}
    aliases = {}
    for named in (player.named_parameters, player.named_buffers):
        for path, tensor in named(remove_duplicate=False):
            aliases[path] = names.setdefault(id(tensor), plain_name(path))
    return aliases


def _for_each_tensor(output: Any, function: Callable[[Tensor], None]) -> None:
    if isinstance(output, Tensor):
        function(output)
    elif isinstance(output, tuple | list):
        for part in output:
            _for_each_tensor(part, function)
    elif isinstance(output, dict):
        for part in output.values():
            _for_each_tensor(part, function)


def _refuse_double_backward(output: Tensor) -> None:
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(_check_single_backward)


def _check_single_backward(gradients: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled():  # within backward this is so only under create_graph=True
        raise UserError(
            "objective: a gradient of a gradient was asked of a player whose gradients are streamed;"
            " name the player in the objective's `given`"
        )
