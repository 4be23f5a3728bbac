"""Settings for memory and speed compute what the plain way computes, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import block_cases as cases
import pytest
import torch
import torch.nn.functional as F
from cases import tiny_recipe
from parity_models import family_recipe
from torch import nn

from dist_train import assembly
from dist_train.errors import UserError
from dist_train.models.chunked_cross_entropy import chunked_cross_entropy
from dist_train.networks import blocks
from dist_train.run_directory import RunDirectory
from dist_train.testing import spawn_ranks
from dist_train.world import World


@pytest.fixture(scope="module")
def recomputed() -> dict[str, list[float]]:
    return spawn_ranks(2, cases.recomputed, timeout=240)[0]


@pytest.mark.parametrize("strategy", cases.STRATEGIES)
@pytest.mark.parametrize("way", cases.WAYS)
def test_recomputation_changes_no_bit(
    recomputed: dict[str, list[float]], strategy: str, way: str
) -> None:
    """Dropout, batch norm and spectral norm in the blocks; gradients of two turns, weights and buffers after them."""
    assert recomputed[f"{strategy}-{way}"] == [0.0, 0.0, 0.0]


def test_recomputation_keeps_less() -> None:
    kept = {}
    for name in ("plain", "recomputed"):
        net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
        if name == "recomputed":
            for module in blocks.repeated_blocks({"net": net}, "here")["net"]:
                blocks.recompute_activations(module)
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net(torch.randn(32, 64, requires_grad=True)).sum()
        kept[name] = sum(saved.values())
    assert kept["recomputed"] <= kept["plain"] / 2


def test_blocks_are_found_by_pattern_or_repetition() -> None:
    net = cases.Blocks()
    assert blocks.repeated_blocks({"net": net}, "here")["net"] == list(net.blocks)
    assert blocks.chosen({"net": net}, ["blocks.[01]", "blocks.0.*"], "here")["net"] == [
        net.blocks[0],
        net.blocks[1],
    ]
    with pytest.raises(UserError, match=r"no module is called 'block\.0'.*did you mean 'blocks.0'"):
        blocks.chosen({"net": net}, ["block.0"], "here")
    with pytest.raises(UserError, match=r"'blocks' is a list, .* name its members: 'blocks\.\*'"):
        blocks.chosen({"net": net}, ["blocks"], "here")
    of_lists = nn.ModuleList(nn.ModuleList(cases.Blocks().blocks) for _ in range(2))
    inner = [block for part in of_lists for block in part]
    assert blocks.separable_blocks(nn.ModuleDict({"net": of_lists})) == inner
    with pytest.raises(UserError, match="no block is repeated"):
        blocks.repeated_blocks({"net": nn.Linear(2, 2)}, "here")


@pytest.mark.parametrize("chunk", (1, 7, 64))
@pytest.mark.parametrize("kind", (torch.float64, torch.float32, torch.bfloat16))
def test_chunked_cross_entropy_equals_the_whole(chunk: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 8), torch.randn(50, 8)
    targets, weights = torch.randint(50, (40,)), torch.rand(40)
    found = []
    for chunked in (True, False):
        h, w = (t.to(kind if kind == torch.float64 else torch.float32) for t in (hidden, weight))
        h.requires_grad_(), w.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            if chunked:
                loss = chunked_cross_entropy(h, w, targets, weights, chunk)
            else:
                losses = F.cross_entropy(F.linear(h, w).float(), targets, reduction="none")
                loss = (losses * weights).sum()
        (3 * loss).backward()
        found.append((loss.detach(), h.grad, w.grad))
    bound = 2.0**-7 if kind == torch.bfloat16 else 1e-6
    for ours, whole in zip(*found, strict=True):
        assert ours.dtype == whole.dtype
        assert float((ours - whole).norm() / whole.norm()) <= bound


def test_chunked_cross_entropy_never_holds_all_logits() -> None:
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, inputs: Any = (), named: Any = None):
            out = function(*inputs, **(named or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        targets = torch.randint(500, (64,))
        chunked_cross_entropy(hidden, weight, targets, torch.ones(64), 8).backward()
    assert max(largest) == 8 * 500


@pytest.fixture(scope="module")
def settings(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("settings")
    return spawn_ranks(2, cases.with_settings, str(tiny_data), str(folder), timeout=200)[0]


@pytest.mark.parametrize("case", cases.RUNS)
def test_runs_with_a_setting_are_those_without(settings: dict[str, Any], case: str) -> None:
    assert settings[case] <= 2e-6


def test_compiled_runs_are_those_without(tiny_data: Path, tmp_path: Path) -> None:
    """With dropout: the draws are the same. One process, since the compiler takes most of the time."""
    if " " in torch.__file__:
        pytest.skip("torch.compile cannot work from a path with a space")
    recipe = tiny_recipe("transformer", tiny_data, strategy="ddp", micro_batches=1)
    losses = {
        str(compiled): cases.losses_of(
            recipe.set("compile", compiled), World(), tmp_path / f"compiled-{bool(compiled)}"
        )
        for compiled in (False, ["blocks.0"])
    }
    off, on = losses.values()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert max(abs(a - b) for a, b in zip(off, on, strict=True)) <= 1e-5


@pytest.mark.soak
def test_views_are_compiled_where_the_network_is(tiny_data: Path, tmp_path: Path) -> None:
    """A GAN with batch norm: the discriminator's turn sees the generator compiled, and the other way round."""
    if " " in torch.__file__:
        pytest.skip("torch.compile cannot work from a path with a space")
    recipe = family_recipe("DCGAN", tiny_data, 2, "none").set("strategy", "single")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    off, on = (
        cases.losses_of(recipe.set("compile", compiled), World(), tmp_path / str(compiled))
        for compiled in (False, True)
    )
    assert on == pytest.approx(off, abs=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 4  # two networks, live and frozen


REFUSED = {
    "a given player": ("wgan_gp", {"compile": True}, "'critic' are given"),
    "zero3": ("resnet", {"compile": True, "strategy": "zero3"}, "zero3 gathers"),
    "graphs": (
        "resnet",
        {"compile": "cuda_graphs", "strategy": "zero2"},
        "cuda_graphs read weights always from the same memory, and zero2 gathers them",
    ),
    "both": ("resnet", {"compile": True, "activation_checkpointing": "auto"}, "not together"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused(tiny_data: Path, tmp_path: Path, case: str) -> None:
    model, changes, message = REFUSED[case]
    recipe = tiny_recipe(model, tiny_data, **changes)
    with pytest.raises(UserError, match=message):
        assembly.build(recipe, World(), RunDirectory.create_at(tmp_path / "run"))


def test_without_a_compiler_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        blocks.compile_forward(nn.Linear(2, 2))
