"""Recipes and durations: what YAML means, how recipes extend and change, how long a run is."""

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.duration import Duration, Every
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.settings import read_assignments, recipe_names
from dist_train.yaml_text import read_yaml, scalar, write_yaml

TWO_PLAYERS = {
    "duration": "10 generator turns",
    "data": {"name": "mnist5k", "global_batch": 8, "micro_batch": 4},
    "model": {
        "generator": {"up": {"name": "conv_generator"}, "down": {"name": "conv_critic"}},
        "critic": {"name": "conv_critic", "channels": "auto"},
    },
    "objective": {"name": "wgan_gp"},
    "optimizer": {
        "generator": {"name": "adam", "learning_rate": 1},
        "critic": {"name": "sgd", "learning_rate": 2},
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("0123", 123),
        ("24:00:00", "24:00:00"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("'12'", "12"),
        ("[1, {a: 3e-4}]", [1, {"a": 3e-4}]),
    ],
)
def test_yaml_means_what_a_person_reads(text, value):
    assert read_yaml(f"key: {text}", "f") == {"key": value}
    assert type(read_yaml(f"key: {text}", "f")["key"]) is type(value)


def test_yaml_aliases_are_copies():
    read = read_yaml("a: &x {b: [1]}\nc: *x", "f")
    read["a"]["b"].append(2)
    assert read["c"] == {"b": [1]}


words = st.one_of(
    st.text(max_size=12).filter(lambda text: text.isprintable()),
    st.sampled_from(
        [
            "on",
            "off",
            "yes",
            "1_000",
            "0123",
            "0o7",
            "0x1f",
            "1e5",
            ".inf",
            "null",
            "~",
            "<<",
            "=",
            "24:00:00",
            "-",
            "?",
            "#",
            "a:b",
        ]
    ),
)
plain = st.recursive(
    st.one_of(
        st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), words
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(words.filter(lambda key: key not in ("", "<<")), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["a", "on", "1", "null", "2e3"]), plain, max_size=4))
def test_what_is_written_reads_back(value):
    assert read_yaml(write_yaml(value), "f") == value


def test_scalars_never_crash_on_long_numbers():
    assert scalar("9" * 5000) == math.inf  # too long for an integer, so a number beyond all
    assert isinstance(scalar("9" * 300), int)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_round_trip(name):
    recipe = Recipe.load(name)
    again = Recipe(**read_yaml(recipe.to_yaml(), name))
    assert again.as_dict() == recipe.as_dict()
    assert recipe.name == name


def test_extends_merges_deeply_and_null_removes(tmp_path):
    (tmp_path / "child.yaml").write_text(
        "extends: resnet-mnist\n"
        "optimizer: {learning_rate: 0.5, momentum: null}\n"
        "callbacks: {ema: null, slow: {name: ema, decay: 0.5}}\n"
        "evaluate: {weights: slow}\n"
    )
    (tmp_path / "grandchild.yaml").write_text("extends: ./child.yaml\nevaluate: null\nname: g\n")
    parent, child = Recipe.load("resnet-mnist"), Recipe.load(tmp_path / "child.yaml")
    assert child.optimizer == {"name": "sgd", "learning_rate": 0.5, "weight_decay": 5e-4}
    assert set(child.callbacks) == set(parent.callbacks) - {"ema"} | {"slow"}
    assert child.callback_specs["slow"] == {"name": "ema", "decay": 0.5}
    assert (child.name, child.data) == ("child", parent.data)
    grandchild = Recipe.load(tmp_path / "grandchild.yaml")
    assert (grandchild.name, grandchild.evaluate) == ("g", None)
    assert grandchild.optimizer == child.optimizer


def test_set_reaches_every_key():
    recipe = Recipe.load(
        "resnet-mnist",
        [
            "data.transforms.train.0.size=24",
            "optimizer={name: adam, learning_rate: 3e-4}",
            "callbacks.slow={name: ema}",
            "callbacks.checkpoint.keep=7",
            "evaluate.metrics.1=bits_per_byte",
            "seed=0123",
        ],
    )
    assert recipe.data.transforms.train == [{"name": "random_crop", "size": 24, "padding": 2}]
    assert recipe.optimizer == {"name": "adam", "learning_rate": 3e-4}
    assert (
        recipe.callbacks["slow"] == {"name": "ema"} and recipe.callbacks["checkpoint"]["keep"] == 7
    )
    assert recipe.evaluate.metrics == ["accuracy", "bits_per_byte"]
    assert recipe.seed == 123
    removed = recipe.set("data.transforms.train.0", None).set("callbacks.slow", None)
    assert removed.data.transforms.train == [] and "slow" not in removed.callbacks
    assert recipe.data.transforms.train, "a recipe never changes"


def test_read_assignments():
    assert read_assignments(["block=256", "a.b=[1]"]) == {"block": 256, "a": {"b": [1]}}


def test_one_player():
    recipe = Recipe.load("resnet-mnist")
    assert recipe.players == ("model",)
    assert recipe.networks == {"model": {"model": recipe.model}}
    assert recipe.optimizers == {"model": recipe.optimizer}
    assert recipe.strategies == {"model": {"name": "zero1"}}


def test_players_with_several_networks():
    recipe = Recipe(**TWO_PLAYERS)
    assert recipe.players == ("generator", "critic")
    assert recipe.networks == {
        "generator": TWO_PLAYERS["model"]["generator"],
        "critic": {"critic": TWO_PLAYERS["model"]["critic"]},
    }
    assert recipe.optimizers["critic"] == {"name": "sgd", "learning_rate": 2}
    assert recipe.strategies == {"generator": {"name": "ddp"}, "critic": {"name": "ddp"}}
    mixed = recipe.set("strategy", {"generator": "zero3", "critic": {"name": "zero1"}})
    assert mixed.strategies == {"generator": {"name": "zero3"}, "critic": {"name": "zero1"}}
    wheres = {where for kind, _, where in recipe.parts() if kind in ("model", "optimizer")}
    assert wheres == {
        "model.generator.up",
        "model.generator.down",
        "model.critic",
        "optimizer.generator",
        "optimizer.critic",
    }


def test_from_python_only_plain_finite_data():
    with pytest.raises(UserError, match=r"model\.net: got .*expected plain data"):
        Recipe(**{**TWO_PLAYERS, "model": {"net": object()}})
    with pytest.raises(UserError, match=r"optimizer\.critic\.betas\.0: got nan"):
        Recipe(**TWO_PLAYERS).set("optimizer.critic.betas", (math.nan, 0.9))
    assert Recipe(**TWO_PLAYERS).set("optimizer.critic.betas", (0.5, 0.9)).optimizer["critic"][
        "betas"
    ] == [0.5, 0.9]


def test_root_is_the_nearest_project(tmp_path, monkeypatch):
    text = Recipe.load("resnet-mnist").to_yaml()
    deep = tmp_path / "project" / "recipes"
    deep.mkdir(parents=True)
    (deep / "r.yaml").write_text(text)
    assert Recipe.load(deep / "r.yaml").root == deep
    (tmp_path / "project" / "pyproject.toml").touch()
    assert Recipe.load(deep / "r.yaml").root == tmp_path / "project"
    assert Recipe.load("resnet-mnist").root == Path.cwd()
    run = tmp_path / "elsewhere" / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(text)
    (run / "environment.json").write_text(f'{{"project_root": "{tmp_path / "project"}"}}')
    assert Recipe.load(run).root == tmp_path / "project"
    monkeypatch.setattr(sys, "path", list(sys.path))
    Recipe.load(run).importable()
    Recipe.load(run).importable()
    assert sys.path.count(str(tmp_path / "project")) == 1


def test_components_are_checked_by_signature_type_and_value():
    recipe = Recipe.load("resnet-mnist").set("callbacks.console", None)
    recipe.check_components()
    for key, value, words in [
        ("model.depth", "auto", None),
        ("model.depth", True, "whole number"),
        ("model.widht", 3, "did you mean 'width'"),
        ("optimizer.momentum", "0.9", "a number"),
        ("optimizer.learning_rate", -1, "optimizer"),
        ("callbacks.ema.decay", 1.5, "callbacks.ema"),
        ("data.transforms.train.0.padding", -1, "data.transforms.train.0"),
    ]:
        changed = recipe.set(key, value)
        if words is None:
            changed.check_components()
        else:
            with pytest.raises(UserError, match=words):
                changed.check_components()


def test_structure_is_checked_without_torch():
    code = (
        "import sys\n"
        "from dist_train.recipe import Recipe\nfrom dist_train.settings import recipe_names\n"
        "[Recipe.load(name).to_yaml() for name in recipe_names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Durations


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7),
        ("1 step", 1),
        ("1e3 steps", 1000),
        ("3 epochs", math.ceil(3 * 1000 / 64)),
        ("0.5 epochs", math.ceil(500 / 64)),
        ("64 samples", 1),
        ("65 samples", 2),
        ("12800 tokens", 10),  # 20 tokens a sample, 1280 a step
        ("12801 tokens", 11),
        ("10 critic turns", 10),
        ("3 generator turns", 11),  # at steps 0, 5 and 10
    ],
)
def test_steps(text, steps):
    def turns(player, step):
        return 1 if player == "critic" else int(step % 5 == 0)

    assert (
        Duration.parse(text).steps(samples=1000, global_batch=64, tokens=20_000, turns=turns)
        == steps
    )


def test_durations_round_trip_as_text():
    for text in ["7 steps", "1 step", "0.5 epochs", "3 generator turns", "1 epoch"]:
        assert str(Duration.parse(text)) == text


def test_turns_that_never_come():
    with pytest.raises(UserError, match="no turn"):
        Duration.parse("1 critic turn").steps(turns=lambda player, step: 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 10_000),
    st.integers(1, 512),
    st.sampled_from(["1 epoch", "0.3 epochs", "2 epochs", "7 steps", "100 samples"]),
)
def test_every_fires_at_the_first_step_past_each_boundary(samples, batch, text):
    every = Every.parse(text)
    period = every.period.exact_steps(samples=samples, global_batch=batch)
    horizon = 200
    expected = {math.ceil(k * period) for k in range(1, int(horizon / period) + 2)}
    fired = {s for s in range(horizon + 1) if every.fires(s, samples=samples, global_batch=batch)}
    assert fired == {step for step in expected if step <= horizon}


def test_epochs_are_exact_where_floats_are_not():
    tenth = Every.parse("0.1 epochs")
    assert tenth.period.amount == Fraction(1, 10)
    fired = [s for s in range(1, 101) if tenth.fires(s, samples=100, global_batch=1)]
    assert fired == list(range(10, 101, 10))
