"""What one GPU does with our trainer: rates, MFU, memory and host gap, each beside a raw torch loop in the same run.

    python benchmarks/gpu.py [--out gpu.json] [--minutes 10] [--device cuda] [--only gpt2-124m] [--small] [--json]

It needs torch and this package, no data and no network. First the card's own limits: matrix products, its memory,
copies from the host. Then GPT-2 124M (T 1024), a 1.3 B Transformer (T 2048), ResNet-50 and DCGAN-64 in bf16: rounds
of our trainer and of the raw loop take turns, for DCGAN-64 also the loop of tutorials (fp32, as written). The results
so far are written after every stage; what no longer fits into `--minutes` is left out and said to be.
`--only resnet-50,dcgan-64` measures those alone; `--device cpu --small` runs the same in miniature anywhere.

FLOPs of Transformers: 6 N + 12 L d T a token, N without the table of positions; of the others: counted. MFU is against
the dense peak of the card in `dist_train/forecast/hardware.py`, and `of_matmul` against the product measured here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_workloads import Bench, Workload, plain_recipe, workloads

from dist_train import assembly
from dist_train.data_shards.loader import MicroBatch
from dist_train.data_shards.write import write_shards
from dist_train.forecast import footprint
from dist_train.forecast.hardware import device_like
from dist_train.forecast.tracing import foresee
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.world import World

ROUNDS, STEPS, WARM_UP = 5, 10, 5
BATCHES = 4
"""Batches that lie on the device before the clock starts, so that only the training is measured."""


class OnDevice:
    """The same few batches again and again, on the device already."""

    def __init__(self, micros: list[MicroBatch]) -> None:
        self.micros = micros

    def from_(self, step: int, stop: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        for now in range(step, stop):
            yield now, [self.micros[now % len(self.micros)]]


def shards_of(work: Workload, folder: Path) -> str:
    """Shards with one batch of the workload's shapes, from which the memory is foreseen."""
    drawn = work.fields(torch.Generator().manual_seed(0), work.batch)

    def rows() -> Iterator[Any]:
        for i in range(work.batch):
            if "tokens" in drawn:
                yield (
                    "train",
                    f"{i:06d}",
                    {"tokens.npy": drawn["tokens"][i].numpy().astype(np.uint16)},
                )
            else:
                shape = drawn["image"].shape
                pixels = np.zeros((shape[2], shape[3], shape[1]), np.uint8)
                yield "train", f"{i:06d}", {"image.npy": pixels, "cls": int(drawn["label"][i])}

    path = folder / work.name
    write_shards(path, work.name, rows(), classes=[str(n) for n in range(10)])
    return str(path)


def measure(work: Workload, bench: Bench, folder: Path, ceiling: float) -> dict[str, Any]:
    """Rates of our trainer and of the raw loop, interleaved, and what ours holds."""
    recipe = Recipe(**plain_recipe(work, shards_of(work, folder)))
    step, _ = foresee(recipe, assembly.build_one)
    foreseen = sum(footprint.rank_memory(step, {"name": "single"}, 1, 1).values())
    card = device_like(torch.cuda.get_device_name()) if bench.kind == "cuda" else None
    foreseen += card.workspaces * 2**20 if card else 0
    reset_peak(bench)
    before = torch.cuda.memory_allocated() if bench.kind == "cuda" else None
    directory = RunDirectory.create_at(folder / f"run-{work.name}")
    trainer = assembly.build(recipe, World(device=bench.device), directory)
    generator = torch.Generator().manual_seed(1)
    drawn = [work.fields(generator, work.batch) for _ in range(BATCHES)]
    batches = [{k: v.to(bench.device) for k, v in one.items()} for one in drawn]
    if work.settings.get("channels_last"):
        for one in batches:
            one["image"] = one["image"].to(memory_format=torch.channels_last)
    trainer.data = OnDevice(
        [MicroBatch(0, np.arange(work.batch), one, work.batch) for one in batches]
    )
    trainer.callbacks.call("run_begins", trainer)

    def ours(steps: int) -> None:
        trainer.train(until=trainer.step + steps)

    bench.seconds(lambda: ours(bench.warm_up))
    peak = torch.cuda.max_memory_allocated() if bench.kind == "cuda" else None
    raw = work.raw(work, batches, bench)
    bench.seconds(lambda: raw(bench.warm_up))
    loops = {"ours": ours, "raw": raw}
    if work.stock is not None:
        loops["stock"] = work.stock(work, batches, bench)
        bench.seconds(lambda: loops["stock"](bench.warm_up))
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(bench.rounds):
        for name, loop in loops.items():
            times[name].append(bench.seconds(lambda loop=loop: loop(bench.steps)) / bench.steps)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    weights = sum(step.weights.values()) // 4
    flops = float(sum(one.flops for one in step.turns.values()))
    if work.convention is not None:
        flops = work.units * work.convention(weights)
    found = {
        "parameters": weights,
        "unit": work.unit,
        f"{work.unit}_per_second": round(work.units / seconds["ours"], 1),
        f"raw_{work.unit}_per_second": round(work.units / seconds["raw"], 1),
        "ours_over_raw": round(seconds["raw"] / seconds["ours"], 4),
        "tflops_per_second": flops / seconds["ours"] / 1e12,
        "mfu": flops / seconds["ours"] / card.flops_per_second("bf16") if card else None,
        "of_matmul": flops / seconds["ours"] / ceiling,
        "bytes_foreseen": foreseen,
        "bytes_measured": peak,
        "bytes_before": before,  # workspaces of cuBLAS and cuDNN, which the peak has in it
        "host_gap_seconds": host_gap(ours, bench),
        "seconds_of_rounds": times,
    }
    if "stock" in seconds:
        found["ours_over_stock"] = round(seconds["stock"] / seconds["ours"], 4)
    trainer.callbacks.call("run_ends", trainer)
    return found


def host_gap(loop: Callable[[int], None], bench: Bench) -> float | None:
    """Seconds of a step in which the GPU runs nothing, by a profile of some steps; None without a GPU."""
    if bench.kind != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        wall = bench.seconds(lambda: loop(bench.steps))
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0, 0
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return max(0.0, wall - busy / 1e9) / bench.steps


def limits(bench: Bench) -> dict[str, float]:
    """What the device itself can do: products, its memory, copies from the host."""
    size, number = (256, 2**20) if bench.small else (8192, 2**28)
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(size, size, device=bench.device, dtype=dtype)
        found[f"matmul_{name}_tflops"] = 2 * size**3 / best(lambda a=a: a @ a, bench) / 1e12
    source = torch.empty(number, device=bench.device)
    target = torch.empty_like(source)
    seconds = best(lambda: target.copy_(source), bench)
    found["memory_gb_per_second"] = 2 * 4 * number / seconds / 1e9
    host = torch.empty(number // 4, pin_memory=bench.kind == "cuda")
    part = target[: number // 4]
    found["copy_from_host_gb_per_second"] = number / best(lambda: part.copy_(host), bench) / 1e9
    return found


def best(work: Callable[[], Any], bench: Bench) -> float:
    """Seconds of one call, the best of some groups of them."""
    work()
    return min(bench.seconds(lambda: [work() for _ in range(5)]) / 5 for _ in range(bench.rounds))


def reset_peak(bench: Bench) -> None:
    gc.collect()
    torch._dynamo.reset()
    if bench.kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="the workloads to measure, by comma")
    parser.add_argument("--small", action="store_true", help="miniatures, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; --device cpu --small runs the miniature")
    device = "cuda:0" if arguments.device == "cuda" else arguments.device
    sizes = (1, 2, 1) if arguments.small else (ROUNDS, STEPS, WARM_UP)
    bench = Bench(device, *sizes, small=arguments.small)
    until = time.monotonic() + 60 * arguments.minutes
    on_gpu = bench.kind == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "small": arguments.small,
        "limits": limits(bench),
    }
    with tempfile.TemporaryDirectory() as folder:
        for work in workloads(arguments.small, compiled=on_gpu):
            if arguments.only and work.name not in arguments.only.split(","):
                continue
            if time.monotonic() > until:
                found[work.name] = {"left_out": f"the {arguments.minutes:g} minutes were over"}
            else:
                try:
                    ceiling = found["limits"]["matmul_bf16_tflops"] * 1e12
                    found[work.name] = measure(work, bench, Path(folder), ceiling)
                except torch.cuda.OutOfMemoryError as error:
                    found[work.name] = {"failed": str(error).splitlines()[0]}
            reset_peak(bench)
            part = arguments.out.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1))
            part.rename(arguments.out)
            if not arguments.json:
                print(
                    work.name,
                    json.dumps(
                        {k: v for k, v in found[work.name].items() if k != "seconds_of_rounds"}
                    ),
                )
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
