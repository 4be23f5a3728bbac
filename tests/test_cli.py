"""The command line: what each command prints, with and without --json, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

from dist_train.launch.cli import main
from dist_train.recipe import Recipe
from dist_train.settings import recipe_names
from dist_train.yaml_text import read_yaml

COMMANDS = [
    "demo",
    "train",
    "launch",
    "status",
    "logs",
    "cancel",
    "sweep",
    "evaluate",
    "predict",
    "generate",
    "ensemble",
    "report",
    "sync",
    "list",
    "doctor",
    "new",
    "plan",
    "verify",
    "shards",
    "checkpoint",
    "diagnose",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")] + [
        "RANK",
        "WORLD_SIZE",
    ]:
        monkeypatch.delenv(name, raising=False)


def as_json(capfd, *arguments, code=0):
    """Run a command with --json: its one value on stdout."""
    assert main([*arguments, "--json"]) == code
    return json.loads(capfd.readouterr().out)


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from dist_train.launch.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'rich', 'deepspeed', 'wandb', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in listed if line.strip()] == COMMANDS
    assert not [line for line in listed if line.endswith("...")]  # a sentence that is cut


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command, capfd):
    assert main([command, "--help"]) == 0
    text = capfd.readouterr().out
    if command not in ("shards", "checkpoint", "diagnose"):
        assert "--json" in text
    assert "micro-order" not in text


def test_version(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == "dist-train 0.1.0\n"


def test_mistakes_as_json(capfd):
    assert main(["train", "resnet-mnits", "--json"]) == 2
    out, err = capfd.readouterr()
    assert "did you mean 'resnet-mnist'" in json.loads(out)["error"]
    assert err == ""


@pytest.mark.parametrize("words", [["--seeds", "2"], ["--quick"]])
def test_a_pause_that_would_not_be_heard_is_refused(words, capfd):
    assert main(["train", "resnet-mnist", "--until", "1 epoch", *words]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "--until" in line and "not together" in line


@pytest.mark.parametrize("words", [["new"], ["shards", "pack", "digits"]])
def test_where_nothing_can_be_written_is_one_line(words, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert main([*words, str(tmp_path / "file" / "out")]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'file'}")


def test_failures_exit_1_with_their_traceback(capfd, monkeypatch):
    monkeypatch.setattr("dist_train.launch.doctor.examine", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err and err.splitlines()[-1] == "error: division by zero"


def test_an_interrupt_is_130_and_a_requeue_75(capfd, monkeypatch):
    def ended(error):
        def examine():
            raise error

        return examine

    monkeypatch.setattr("dist_train.launch.doctor.examine", ended(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    monkeypatch.setattr("dist_train.launch.doctor.examine", ended(SystemExit(75)))
    with pytest.raises(SystemExit) as leaving:
        main(["doctor"])
    assert leaving.value.code == 75


def test_print_recipe_resolves_without_training(tmp_path, capfd):
    assert main(["train", "resnet-mnist", "--set", "seed=7", "--print-recipe"]) == 0
    printed = capfd.readouterr().out
    expected = Recipe.load("resnet-mnist").set("seed", 7).as_dict()
    assert read_yaml(printed, "printed") == expected
    assert as_json(capfd, "train", "resnet-mnist", "--set", "seed=7", "--print-recipe") == expected
    assert list(tmp_path.iterdir()) == []


def test_train_under_zero_without_a_launcher(tiny_data, tmp_path):
    """One process, none of the variables that a launcher sets: what a newcomer types first."""
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="zero1", duration="4 steps")
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environ = {key: value for key, value in os.environ.items() if key not in places}
    command = [sys.executable, "-m", "dist_train", "train", "tiny.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4


def test_no_run_was_launched(capfd):
    assert as_json(capfd, "status") == {}
    assert main(["status"]) == 0
    assert capfd.readouterr().err == "no run in runs/ was started by `launch`\n"
    assert main(["logs", "mine"]) == 2
    assert "mine: no run directory" in capfd.readouterr().err


def test_list(capfd):
    found = as_json(capfd, "list")
    assert sorted(found["recipe"]) == recipe_names()
    assert all(part["about"] for parts in found.values() for part in parts.values())
    assert "learning_rate" in found["optimizer"]["sgd"]["arguments"]
    assert main(["list", "optimizer"]) == 0
    text = capfd.readouterr().out
    assert "adamw" in text and "resnet" not in text


def test_doctor(capfd):
    found = as_json(capfd, "doctor")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["backends"]["gloo"] and found["cores"] >= 1
    assert found["data"]["python-text"] == "present"


def test_shards(tmp_path, capfd):
    packed = as_json(capfd, "shards", "pack", "python-text", "text", "--set", "block=64")
    assert packed["vocab_size"] == 256 and packed["samples"]["train"] > 0
    assert as_json(capfd, "shards", "check", "text")["differences"] == []
    assert as_json(capfd, "shards", "show", "text")["vocab_size"] == 256
    assert as_json(capfd, "shards", "index", "text")["samples"] == packed["samples"]
    assert main(["shards", "show", "text"]) == 0
    assert "vocab_size" in capfd.readouterr().out
    shard = min((tmp_path / "text").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert len(as_json(capfd, "shards", "check", "text", code=1)["differences"]) == 1


def test_stdout_is_the_result_even_if_the_work_prints(capfd, monkeypatch):
    def examine():
        os.write(1, b"from a library\n")
        return {"fine": True}

    monkeypatch.setattr("dist_train.launch.doctor.examine", examine)
    assert main(["doctor", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"fine": True}
    assert err == "from a library\n"


def test_a_table_shows_what_is_there_and_what_is_not(capfd, monkeypatch):
    found = {"deep": {"rates": [0.1, 1 / 3], "names": ["a", "b"]}, "stopped": "", "shape": [2, 3]}
    monkeypatch.setattr("dist_train.launch.doctor.examine", lambda: found | {"lost": []})
    assert main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    assert lines["deep.rates"] == "0.1, 0.333333" and lines["deep.names"] == "a, b"
    assert lines["stopped"] == lines["lost"] == "none" and lines["shape"] == "[2, 3]"


def test_only_rank_0_prints(capfd, monkeypatch):
    monkeypatch.setattr("dist_train.launch.doctor.examine", dict)
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor", "--json"]) == 0
    assert capfd.readouterr().out == ""


def test_ranks_under_a_launcher(capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "resnet-mnist", "--ranks", "2"]) == 2
    assert "WORLD_SIZE" in capfd.readouterr().err


def test_accelerate_is_checked_by_train(capfd, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert main(["train", "resnet-mnist"]) == 2
    assert "ACCELERATE_MIXED_PRECISION=fp8" in capfd.readouterr().err


def test_new_writes_the_example(capfd, tmp_path):
    """`examples/own_project` is what `new` writes: one source, and a test that they agree."""
    result = as_json(capfd, "new", "own_project")
    example = Path(__file__).parents[1] / "examples" / "own_project"
    written = {name: (tmp_path / "own_project" / name).read_text() for name in result["files"]}
    kept = {name: (example / name).read_text() for name in result["files"]}
    assert written == kept
    assert main(["new", "own_project"]) == 2
    assert "exists already" in capfd.readouterr().err
