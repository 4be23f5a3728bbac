"""`accelerate launch`: what its configuration says, by environment variables, is taken into the recipe.

The only file that knows accelerate. Its Accelerator is not used: its launcher starts our ranks as torchrun does.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_train.errors import UserError, nearest
from dist_train.launch.backend import Backend, Job, Status
from dist_train.launch.local import Local, ended
from dist_train.ranks.parent import die_with_parent
from dist_train.restarts import begin_to_count, may_restart
from dist_train.settings import short
from dist_train.strategies import STRATEGIES
from dist_train.yaml_text import read_yaml

if TYPE_CHECKING:
    from dist_train.recipe import Recipe

CONFIGS = Path(__file__).parent / "accelerate_configs"
CONFIG = "accelerate.json"
REQUEUE = 75
STAGES = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}
FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "SHARDING_STRATEGY": (("full_shard", "1"), "groups of ranks are strategy.shard_degree"),
    "AUTO_WRAP_POLICY": (
        ("transformer_based_wrap",),
        "fsdp2 gathers repeated blocks by themselves: expected TRANSFORMER_BASED_WRAP",
    ),
    "TRANSFORMER_CLS_TO_WRAP": ((), "fsdp2 finds the repeated blocks itself"),
    "BACKWARD_PREFETCH": (("backward_pre",), "fsdp2 has one order: expected BACKWARD_PRE"),
    "FORWARD_PREFETCH": ((), "a block is gathered when it is called"),
    "ACTIVATION_CHECKPOINTING_OFFLOAD": ((), "activation_checkpointing keeps inputs on the device"),
    "IGNORED_MODULES": ((), "every weight has its strategy"),
}
"""Of accelerate's settings of FSDP 2 what each may say, and why nothing else."""
FSDP_TAKEN = ("VERSION", "RESHARD_AFTER_FORWARD", "OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING")
FSDP_MEANINGLESS = (
    *("MIN_NUM_PARAMS", "USE_ORIG_PARAMS"),  # of other policies, and of version 1
    *("STATE_DICT_TYPE", "CPU_RAM_EFFICIENT_LOADING", "SYNC_MODULE_STATES"),  # Accelerator's own
)
UNSAID = ("", "no", "none", "auto", "false")
"""What accelerate exports where nothing was asked."""


class Asked(NamedTuple):
    """A setting of the recipe that accelerate was told, and the words it was told in."""

    key: str
    value: Any
    words: str


class Accelerate(Backend):
    """`--on accelerate`: the ranks of this machine, in the background, started by accelerate.

    Its configuration says how many; strategy and precision stay the recipe's.
    """

    takes = Local.takes

    def __init__(self) -> None:
        self._local = Local("dist_train.launch.accelerate")

    def check(self, job: Job, dry_run: bool) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise UserError("--on accelerate: needs it: pip install 'dist-train[accelerate]'")
        self._local.check(job, dry_run)

    def render(self, job: Job) -> dict[str, str]:
        settings = read_yaml((CONFIGS / "ddp.yaml").read_bytes(), "ddp.yaml")
        # as JSON, for accelerate would read our `no` as false
        return {CONFIG: json.dumps(settings | {"num_processes": job.spec.ranks}, indent=2) + "\n"}

    def submit(self, job: Job) -> str:
        return self._local.submit(job)

    def status(self, job: Job) -> Status:
        return self._local.status(job)

    def cancel(self, job: Job) -> None:
        self._local.cancel(job)


def main(run_dir: str) -> int:
    """Run a submitted job to its end, started again as long as that leads on."""
    job = Job.read(Path(run_dir))
    launch = [job.python, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    command = [*launch, "--main_process_port", "0", *job.train_command()[1:]]
    begin_to_count(job.run_dir)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    while True:
        process = subprocess.Popen(command, cwd=job.run_dir, preexec_fn=die_with_parent)
        told = False
        while (code := process.poll()) is None:
            if asked and not told:  # accelerate hands it on to the ranks, which save; a second one
                process.terminate()  # would make it leave at once, and take them with it
                told = True
            time.sleep(0.2)
        if asked and code:
            code = REQUEUE
        if code in (0, REQUEUE) or not may_restart(job.run_dir, job.spec.max_restarts):
            return ended(job, code)


def adopt(recipe: Recipe, environ: Mapping[str, str]) -> Recipe:
    """The recipe with what it leaves open filled in from accelerate; UserError where the two say different things."""
    _refuse(environ)
    given = recipe.model_fields_set
    for key, value, words in _asked(environ):
        if key == "strategy":
            recipe = _adopt_strategy(recipe, value, words, key in given)
        elif key == "clipping":
            recipe = _adopt_clipping(recipe, value, words)
        elif key == "accumulation":
            _check_accumulation(recipe, value, words, int(environ.get("WORLD_SIZE", "1")))
        elif key in given:
            if getattr(recipe, key) != value:
                raise _differ(key, getattr(recipe, key), words)
        else:
            recipe = _with(recipe, key, value, words)
    return recipe


def _asked(environ: Mapping[str, str]) -> Iterator[Asked]:
    """What accelerate was asked for, in the recipe's words."""

    def said(name: str) -> tuple[str, str] | None:
        value = environ.get(name, "")
        return None if value.lower() in UNSAID else (value.lower(), f"{name}={value}")

    if precision := said("ACCELERATE_MIXED_PRECISION"):
        yield Asked("precision", *precision)
    if dynamo := said("ACCELERATE_DYNAMO_BACKEND"):
        if dynamo[0] != "inductor":
            raise UserError(
                f"accelerate says {dynamo[1]}, which a recipe cannot: expected inductor"
            )
        yield Asked("compile", True, dynamo[1])
    if said("ACCELERATE_USE_FSDP"):
        yield from _from_fsdp(environ)
    if said("ACCELERATE_USE_DEEPSPEED") is None:
        return
    if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").replace("none", ""):
        yield from _from_deepspeed(Path(file))
        return
    if stage := said("ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        strategy = {"name": STAGES.get(stage[0], f"stage {stage[0]}")}
        words = stage[1]
        for what in ("OPTIMIZER", "PARAM"):
            if device := said(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"):
                path = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_NVME_PATH", "none")
                strategy |= _offload(what.lower(), device[0], path, device[1])
                words += f", {device[1]}"
        yield Asked("strategy", strategy, words)
    if clipping := said("ACCELERATE_GRADIENT_CLIPPING"):
        yield Asked("clipping", float(clipping[0]), clipping[1])
    if steps := said("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        yield Asked("accumulation", int(steps[0]), steps[1])


def _from_fsdp(environ: Mapping[str, str]) -> Iterator[Asked]:
    """`fsdp2` out of the environment of FSDP version 2; UserError, with the reason, for what else it says."""
    told = {
        name.removeprefix("FSDP_"): value
        for name, value in environ.items()
        if name.startswith("FSDP_")
    }
    version = told.get("VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate says FSDP_VERSION={version}, expected 2 (fsdp_config: {{fsdp_version: 2}}):"
            " fsdp2 is torch's fully_shard"
        )
    known = (*FSDP, *FSDP_TAKEN, *FSDP_MEANINGLESS)
    for name, value in told.items():
        allowed, reason = FSDP.get(name, ((), f"no setting of fsdp2{nearest(name, known)}"))
        if name in (*FSDP_TAKEN, *FSDP_MEANINGLESS) or value.lower() in (*UNSAID, *allowed):
            continue
        raise UserError(f"accelerate says FSDP_{name}={value}, which a recipe cannot: {reason}")
    reshards = told.get("RESHARD_AFTER_FORWARD", "true")
    if reshards.lower() not in ("true", "false"):
        raise UserError(
            f"accelerate says FSDP_RESHARD_AFTER_FORWARD={reshards}, expected true or false"
        )
    strategy: dict[str, Any] = {"name": "fsdp2"}
    words = f"FSDP_VERSION=2, FSDP_RESHARD_AFTER_FORWARD={reshards}"
    if reshards.lower() == "false":
        strategy["reshard_after_forward"] = False
    if (offload := told.get("OFFLOAD_PARAMS", "false")).lower() == "true":
        strategy["offload"] = "all"
        words += f", FSDP_OFFLOAD_PARAMS={offload}"
    yield Asked("strategy", strategy, words)
    if told.get("ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        yield Asked("activation_checkpointing", "auto", "FSDP_ACTIVATION_CHECKPOINTING=true")


def _from_deepspeed(file: Path) -> Iterator[Asked]:
    """The same out of a DeepSpeed configuration file; what the recipe has no word for goes to `strategy.deepspeed`."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as DeepSpeed's JSON: {error}") from None
    settings = _without_auto(settings)
    for name in ("fp16", "bf16"):
        if settings.pop(name, {}).get("enabled"):
            yield Asked("precision", name, f"{file}: {name}.enabled")
    zero = settings.pop("zero_optimization", {})
    strategy: dict[str, Any] = {"name": STAGES[str(zero.pop("stage", 0))]}
    for what in ("optimizer", "param"):
        given = zero.pop(f"offload_{what}", {})
        if device := given.get("device", "none").replace("none", ""):
            path = given.get("nvme_path", "none")
            strategy |= _offload(what, device, path, f"{file}: offload_{what}")
    if clipping := settings.pop("gradient_clipping", 0):
        yield Asked("clipping", float(clipping), f"{file}: gradient_clipping: {clipping}")
    if steps := settings.pop("gradient_accumulation_steps", 0):
        yield Asked("accumulation", steps, f"{file}: gradient_accumulation_steps: {steps}")
    rest = settings | ({"zero_optimization": zero} if zero else {})
    if rest:
        strategy["deepspeed"] = rest
    yield Asked("strategy", strategy, str(file))


def _without_auto(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _without_auto(value) for key, value in settings.items() if value != "auto"}


def _offload(what: str, device: str, path: str, words: str) -> dict[str, str]:
    """Where the optimiser or the parameters are to lie, in the words of `strategy`."""
    if (what, device) == ("optimizer", "nvme") and path != "none":
        return {"offload": "optimizer", "nvme_path": path}
    if device != "cpu":
        nvme = ", or nvme with its path" if what == "optimizer" else ""
        raise UserError(f"accelerate says {words}: expected cpu or none{nvme}")
    return {"offload": {"optimizer": "optimizer", "param": "all"}[what]}


def _adopt_strategy(recipe: Recipe, asked: dict[str, Any], words: str, given: bool) -> Recipe:
    if not given:
        return _with(recipe, "strategy", asked, words)
    for player, strategy in recipe.strategies.items():
        if any(strategy.get(key) != value for key, value in asked.items()):
            raise _differ("strategy", strategy, words, f" for '{player}'")
    return recipe


def _adopt_clipping(recipe: Recipe, norm: float, words: str) -> Recipe:
    specs = [spec for spec in recipe.callback_specs.values() if spec["name"] == "clip_gradients"]
    for spec in specs:
        if spec.get("norm") != norm:
            raise _differ("callbacks.clip_gradients", spec, words)
    return recipe if specs else _with(recipe, "callbacks.clip_gradients", {"norm": norm}, words)


def _check_accumulation(recipe: Recipe, steps: int, words: str, ranks: int) -> None:
    """A recipe gives the global batch, so accumulation follows; 1 is also what accelerate says when asked nothing."""
    ours = recipe.data.global_batch // recipe.data.micro_batch // ranks
    if steps not in (1, ours):
        raise _differ("data", f"{ours} micro-batches a rank and step", words)


def _with(recipe: Recipe, key: str, value: Any, words: str) -> Recipe:
    try:
        return recipe.set(key, value)
    except UserError as error:
        raise UserError(f"accelerate says {words}: {error}") from None


def _refuse(environ: Mapping[str, str]) -> None:
    """What accelerate can be asked for and a recipe has no word for."""
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", f"strategies are {', '.join(STRATEGIES)}"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "hybrid sharding is strategy.shard_degree"),
    ):
        if environ.get(name, "").lower() not in UNSAID:
            raise UserError(
                f"accelerate says {name}={environ[name]}, which a recipe cannot: {what}"
            )


def _differ(key: str, ours: Any, words: str, of: str = "") -> UserError:
    return UserError(
        f"{key}: the recipe says {short(ours)}{of}, accelerate says {words}; expected them to agree"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
