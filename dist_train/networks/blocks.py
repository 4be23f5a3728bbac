"""What is done to some modules of a network: activations recomputed instead of kept, forwards compiled.

Both leave the names of weights as they are, and both mean the same numbers: recomputation replays the random draws and
the buffers that the forward saw, and leaves no second trace (law 11).
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from dist_train.errors import UserError, nearest

LISTS = (nn.ModuleList, nn.ModuleDict)
CUDA_GRAPHS = "triton.cudagraphs"
"""torch.compile's option."""
LARGE_BYTES = 2**20
"""The weights of a layer for which a collective of its own is worth it."""


def chosen(
    networks: Mapping[str, nn.Module], patterns: Sequence[str], where: str
) -> dict[str, list[nn.Module]]:
    """{network: its modules whose names match a pattern like `blocks.*`, none inside another}.

    Raises UserError for a pattern that matches in no network, or a list of modules, which nobody calls.
    """
    names = {key: [n for n, _ in network.named_modules() if n] for key, network in networks.items()}
    every = list(dict.fromkeys(name for those in names.values() for name in those))
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise UserError(
                f"{where}: no module is called '{pattern}'{nearest(pattern, every)}"
                f" (there are {', '.join(every[:8])}{', ...' if len(every) > 8 else ''})"
            )
    found = {
        key: _outermost(network, [n for p in patterns for n in fnmatch.filter(names[key], p)])
        for key, network in networks.items()
    }
    for key, modules in found.items():
        for name, module in networks[key].named_modules():
            if isinstance(module, LISTS) and module in modules:
                raise UserError(
                    f"{where}: '{name}' is a list, which is never called; name its members: '{name}.*'"
                )
    return found


def repeated_blocks(networks: Mapping[str, nn.Module], where: str) -> dict[str, list[nn.Module]]:
    """{network: `blocks_of` it}. Raises UserError where no network has any."""
    found = {key: blocks_of(network) for key, network in networks.items()}
    if not any(found.values()):
        raise UserError(
            f"{where}: auto, but no block is repeated in {', '.join(networks)}; name modules instead"
        )
    return found


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of its lists and sequences that have parts of their own and others of their kind."""
    return _outermost(network, _block_names(network))


def _block_names(network: nn.Module) -> list[str]:
    members = {
        name: child
        for name, child in _members(network).items()
        if list(child.children()) and not isinstance(child, LISTS)
    }
    kinds = [type(child) for child in members.values()]
    return [name for name, child in members.items() if kinds.count(type(child)) > 1]


def _members(network: nn.Module) -> dict[str, nn.Module]:
    """What its lists and sequences hold, which is there to be called."""
    return {
        f"{path}.{name}".removeprefix("."): child
        for path, parent in network.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for name, child in parent.named_children()
    }


def separable_blocks(networks: nn.ModuleDict) -> list[nn.Module]:
    """What fsdp2 gathers by itself: `blocks_of` all networks of a player, and large layers that are members of lists
    and sequences outside of them; but none whose weights stand elsewhere too."""
    found = []
    for network in networks.values():
        large = [
            name
            for name, child in _members(network).items()
            if not list(child.children())
            and sum(p.numel() * p.element_size() for p in child.parameters()) >= LARGE_BYTES
        ]
        found += _outermost(network, [*_block_names(network), *large])
    everywhere = _names_of_each(networks)
    return [b for b in found if all(everywhere[i] == n for i, n in _names_of_each(b).items())]


def _names_of_each(module: nn.Module) -> dict[int, int]:
    """{id of a parameter: under how many names it is there}."""
    count: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _outermost(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    inside = tuple(f"{name}." for name in names)
    return [network.get_submodule(n) for n in dict.fromkeys(names) if not n.startswith(inside)]


def recompute_activations(module: nn.Module) -> None:
    """Keep only the inputs of `module` for backward, and compute what is in between again (Chen et al. 2016)."""
    kind = type(module)
    module.__class__ = type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})


class _Recomputed(nn.Module):
    """Its forward's tensors are those of the call: a view passes weights in for the time of a call only."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        run = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return run(*inputs, **named)
        replay = _Replay(self)
        return checkpoint(
            run,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), replay),
            **named,
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Replay:
    """The module as its forward found it, for the time of a recomputation; a double backward asks for several."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.tensors = module, _tensors(module)
        self.before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def __enter__(self) -> None:
        present = _tensors(self.module)
        borrowed = {name: t for name, t in self.tensors.items() if t is not present[name]}
        self.after = {name: self.tensors[name].clone() for name in self.before}
        _write(self.tensors, self.before)
        self.weights = _reparametrize_module(self.module, borrowed)
        self.weights.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.weights.__exit__(None, None, None)
        _write(self.tensors, self.after)


def _write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].data.copy_(value)  # unseen by autograd, which may have saved the buffer


def compile_forward(module: nn.Module, cuda_graphs: bool = False) -> None:
    """Compile the module's forward by `torch.compile`, with the random draws that it makes without.

    Views of the module are copies: frozen ones are compiled too (`compile_like`), the others run as written.

    Args:
        cuda_graphs: whether what is compiled, and its backward, are replayed as CUDA graphs: a call of the host each.
    """
    from torch._inductor import config, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "compile: torch.compile needs a C++ compiler, and there is none on this machine;"
            " install g++ or clang++, or remove compile"
        ) from error
    if " " in torch.__file__:  # torch hands its folder to the compiler unquoted
        raise UserError(
            f"compile: torch.compile cannot work from a path with a space ({torch.__file__});"
            " install torch elsewhere, or remove compile"
        )
    config.fallback_random = True
    module.compile(options={CUDA_GRAPHS: cuda_graphs})


def compile_like(copy: nn.Module, module: nn.Module, cuda_graphs: bool) -> None:
    """Compile the forwards of a copy that are compiled in the module."""
    for mine, theirs in zip(copy.modules(), module.modules(), strict=True):
        if theirs._compiled_call_impl is not None:
            mine.compile(options={CUDA_GRAPHS: cuda_graphs})
