"""Where a run goes, as data: the recipe's `launch:`, then a site's profile, then the flags of the command."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from dist_train.errors import UserError, nearest
from dist_train.settings import short
from dist_train.yaml_text import read_yaml

PROFILES = Path(__file__).resolve().parents[1] / "slurm" / "profiles"


@dataclass(frozen=True)
class Spec:
    """Every setting of a launch. What a backend does not take has no effect there.

    Attributes:
        on: the backend. profile: a file of defaults, by name or path.
        nodes, gpus_per_node, ranks_per_node: gpus_per_node 0 means CPU ranks; ranks_per_node defaults to one a GPU.
        gpu: what they are, by a name of hardware.py, so that a run that cannot fit them is refused before the queue.
        max_restarts: how often in a row a run may end without a new checkpoint before nobody starts it again.
        env: names of variables whose values travel to the ranks. setup: shell lines that run before them.
        notice: seconds before the time limit at which the ranks are told to save.
        array: ids of members, as Slurm writes them ("0-3", "0-9%2"); each is a run of its own, see `each`.
        each: {setting: [a value for each member]}; without it members differ by their seed.
        sbatch: further options of sbatch, {"exclusive": "user"}.
    """

    on: str = "local"
    profile: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str | None = None
    ranks_per_node: int | None = None
    cpus_per_rank: int | None = None
    max_restarts: int = 3
    env: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    array: str | None = None
    each: dict[str, list[Any]] = field(default_factory=dict)
    dependency: str | None = None
    mail_user: str | None = None
    container_image: str | None = None
    container_mounts: str | None = None
    notice: int = 120
    sbatch: dict[str, str] = field(default_factory=dict)

    @property
    def local_ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.local_ranks

    @property
    def members(self) -> list[int]:
        """The ids of an array, none without one."""
        ids: set[int] = set()
        for part in (self.array or "").partition("%")[0].split(","):
            if part:
                first, _, rest = part.partition("-")
                last, _, step = rest.partition(":")
                ids |= set(range(int(first), int(last or first) + 1, int(step or 1)))
        return sorted(ids)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


NAMES = [one.name for one in dataclasses.fields(Spec)]
_LEAST = {
    "nodes": 1,
    "gpus_per_node": 0,
    "ranks_per_node": 1,
    "cpus_per_rank": 1,
    "max_restarts": 0,
    "notice": 10,
}
_ARRAY = re.compile(
    r"\d{1,6}(-\d{1,6}(:[1-9]\d{0,5})?)?(,\d{1,6}(-\d{1,6}(:[1-9]\d{0,5})?)?)*(%\d+)?"
)
_SHAPES: dict[str, tuple[re.Pattern[str], str]] = {
    "time": (
        re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}"),
        "minutes, HH:MM:SS or D-HH:MM:SS",
    ),
    "mem": (re.compile(r"\d+[KMGT]?"), "a size like 64G"),
    "array": (_ARRAY, "ids like 0-3, 1,5,9 or 0-99%4"),
}


def make_spec(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> Spec:
    """The recipe's `launch:` settings, a profile over them, and the flags that were given over both.

    Raises UserError, which names where a wrong setting stands.
    """
    asked = {name: value for name, value in flags.items() if value not in (None, [], {})}
    named = asked.get("profile") or recipe.get("profile")
    layers = [("launch", recipe), *_profile(named), ("", asked)]
    settings: dict[str, Any] = {}
    for where, layer in layers:
        for name, value in layer.items():
            _check(name, value, f"{where}.{name}" if where else "--" + name.replace("_", "-"))
            settings[name] = value
    spec = Spec(**settings)
    _check_each(spec)
    return spec


def _profile(name: str | None) -> list[tuple[str, dict[str, Any]]]:
    """A profile's settings and how errors name it. Without a name: the user's own `default`, if there is one."""
    folders = [user_profiles(), PROFILES]
    if name is None:
        file = folders[0] / "default.yaml"
        if not file.is_file():
            return []
    elif "/" in name or name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
    else:
        there = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
        if name not in there:
            raise UserError(
                f"profile: got {short(name)}, expected a YAML file or one of {', '.join(sorted(there))}"
                + nearest(name, there)
            )
        file = there[name]
    try:
        settings = read_yaml(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"profile {file}: {error.strerror}") from None
    if not isinstance(settings, dict):
        raise UserError(f"profile {file}: got {short(settings)}, expected settings of a launch")
    return [(f"profile {file}: launch", settings)]


def user_profiles() -> Path:
    """The folder of the user's own profiles."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "dist-train" / "profiles"


def _check(name: str, value: Any, where: str) -> None:
    if name not in NAMES:
        raise UserError(
            f"{where}: unknown key{nearest(name, NAMES)} (expected one of {', '.join(NAMES)})"
        )
    hint = str(get_type_hints(Spec)[name])
    if "list[str]" in hint and "dict" not in hint:
        fine = isinstance(value, list) and all(isinstance(one, str) for one in value)
        expected = "a list of texts"
    elif hint.startswith("dict[str, list"):
        fine = isinstance(value, dict) and all(isinstance(one, list) for one in value.values())
        expected = "a mapping {setting: [a value for each member]}"
    elif hint.startswith("dict"):
        fine = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
        expected = "a mapping of texts"
    elif "int" in hint:
        least = _LEAST[name]
        fine = isinstance(value, int) and not isinstance(value, bool) and least <= value <= 10**6
        expected = f"a whole number, {least} or more"
    else:
        pattern, expected = _SHAPES.get(name, (re.compile(r"(?s).+"), "a text"))
        fine = isinstance(value, str) and pattern.fullmatch(value) is not None
    if not fine:
        raise UserError(f"{where}: got {short(value)}, expected {expected}")
    texts = [value, *value] if isinstance(value, list) else [value]
    for text in [*texts, *(value.values() if isinstance(value, dict) else ())]:
        if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
            raise UserError(
                f"{where}: got {short(text)}, expected one line without control characters"
            )


def _check_each(spec: Spec) -> None:
    if spec.each and not spec.array:
        raise UserError("each: needs array, the ids of the members (like --array 0-3)")
    for key, values in spec.each.items():
        if len(values) != len(spec.members):
            raise UserError(
                f"each.{key}: got {len(values)} values, expected {len(spec.members)}, one for each member"
                f" of array {spec.array}"
            )
