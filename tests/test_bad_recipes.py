"""A bad recipe ends in exit 2 with one line: where, what, and what would be right. Never a traceback."""

import subprocess
import sys

import pytest

from dist_train.launch.cli import main

GOOD = """\
project: tests
duration: 2 steps
strategy: single
data: {name: digits, global_batch: 16, micro_batch: 8, transforms: {train: [{name: random_crop, size: 8, padding: 1}]}}
model: {name: resnet, depth: 8, width: 4, in_channels: auto, num_classes: auto}
objective: {name: classification}
optimizer: {name: sgd, learning_rate: 0.1}
evaluate: {split: test, every: 1 epoch, metrics: [accuracy, loss], best: accuracy, mode: max}
callbacks:
  learning_rate_decay: {schedule: cosine}
  clip_gradients: {norm: 1.0}
  ema: {decay: 0.9}
  checkpoint: {every: 1 epoch, keep: 2}
"""
PLAYERS = "model={generator: {name: conv_generator}, critic: {name: conv_critic}}"

SETTINGS = {
    # setting: what the line must say
    "duration=20": ["duration", "20", "20 steps", "20 epochs"],
    "duration=-1 epochs": ["duration", "-1 epochs"],
    "compile=graphs": [" compile: got 'graphs'", "cuda_graphs"],
    "duration=0 steps": ["duration", "more than 0"],
    "duration=2 epoochs": ["duration", "did you mean 'epochs'"],
    "duration=1.5 steps": ["duration", "whole"],
    "duration=.inf": ["duration", "inf", "finite"],
    "duration=9e99 steps": ["duration", "at most"],
    "duration=5 turns": ["duration", "5000 generator turns"],
    "duration=5 critic turns": ["duration", "expected one of the players model"],
    "duration=null": ["duration", "missing", "20 epochs"],
    "seed=-1": ["seed", "-1"],
    "seed=1.5": ["seed", "1.5"],
    "seed=true": ["seed", "True"],
    "seed=9223372036854775808": ["seed", "2**63"],
    "seed=on": ["seed", "'on'"],
    "precision=fp8": ["precision", "fp32, bf16 or fp16"],
    "project=../up": ["project", "'../up'"],
    "name=''": ["name", "''"],
    "strategy=atuo": ["strategy", "auto", "zero3"],
    "strategy=zero4": ["strategy", "did you mean 'zero3'"],
    "strategy={name: ddp, offload: optimizer}": ["strategy.offload", "unknown key", "name"],
    "strategy={name: zero2, offload: all}": ["strategy.offload", "zero3"],
    "strategy={name: zero3, offload: nvme}": ["strategy.offload", "all", "nvme_path"],
    "strategy={name: zero3, nvme_path: /scratch}": ["strategy.nvme_path", "/scratch", "offload: "],
    "strategy={name: zero3, offload: all, nvme_path: 3}": ["strategy.nvme_path", "3", "folder"],
    "strategy={name: zero3, view_elements: true}": ["strategy.view_elements", "True"],
    "strategy={name: zero2, offload: disk}": ["strategy.offload", "none, optimizer, all"],
    "strategy={name: zero2, deepspeed: {gradient_clipping: 0.5}}": [
        "strategy.deepspeed.gradient_clipping",
        "callbacks.clip_gradients",
    ],
    "strategy={name: zero2, deepspeed: {zero_optimization: {stage: 3}}}": [
        "strategy.deepspeed.zero_optimization.stage",
        "'strategy.name'",
    ],
    "strategy={name: zero2, deepspeed: {fp16: {enabled: true}}}": [
        "strategy.deepspeed.fp16.enabled",
        "'precision'",
    ],
    "strategy={name: zero3, persistence_threshold: -1}": ["strategy.persistence_threshold", "-1"],
    "strategy={critic: zero1}": ["strategy.critic", "model"],
    "strategy=[zero1]": ["strategy", "single, ddp"],
    "threads=0": ["threads", "0", "auto"],
    "threads=many": ["threads", "'many'", "auto"],
    "log.every=10": ["log.every", "10 steps"],
    "log.evry=10 steps": ["log.evry", "did you mean 'every'"],
    "log=quiet": ["log", "'quiet'"],
    "data.global_batch=0": ["data.global_batch", "0"],
    "data.global_batch=1_000": ["data.global_batch", "'1_000'"],
    "data.global_batch=1e99": ["data.global_batch", "1e+99"],
    "data.micro_batch=6": ["data.micro_batch", "6", "1, 2, 4, 8, 16"],
    "data.micro_batch=.nan": ["data.micro_batch", "nan"],
    "data.globl_batch=16": ["data.globl_batch", "did you mean 'global_batch'"],
    "data.name=digitz": ["data.name", "did you mean 'digits'"],
    "data.path=somewhere": ["data.name", "one of the two", "name: null"],
    "data.name=null": ["data.name", "one of the two"],
    "data={path: file:///pets, global_batch: 4, micro_batch: 4}": ["data.path", "file://", "folder"],
    "data={path: https://me:key@host/pets, global_batch: 4, micro_batch: 4}": ["data.path", "without user"],
    "data.options.block=3": ["data.block", "digits"],
    "data.scale=normal": ["data.scale", "standard", "unit"],
    "data.workers=-1": ["data.workers", "-1"],
    "data.transforms.train=random_crop": ["data.transforms.train", "list"],
    "data.transforms.train=[random_crop]": ["data.transforms.train.0", "name"],
    "data.transforms.train.0.name=crop": ["data.transforms.train.0", "no transform", "random_crop"],
    "data.transforms.train.0.sise=3": ["data.transforms.train.0.sise", "did you mean 'size'"],
    "data.transforms.train.1.size=3": ["data.transforms.train.1", "position"],
    "data.transforms.test=[]": ["data.transforms.test", "evaluate"],
    "model=resnet": ["model", "'resnet'", "name"],
    "model={}": ["model", "{}"],
    "model.name=resnot": ["model.name", "did you mean 'resnet'"],
    "model.dept=8": ["model.dept", "did you mean 'depth'"],
    "model.depth=eight": ["model.depth", "'eight'", "whole number"],
    "model.depth=8.5": ["model.depth", "8.5", "whole number"],
    "model={name: transformer}": ["model.vocab_size", "needs"],
    "model={name: nowhere.at_all:Net}": ["model.name", "nowhere.at_all", "project root"],
    "model={name: dist_train.errors:UserEror}": ["model.name", "did you mean 'UserError'"],
    PLAYERS: ["model", "generator", "critic", "classification"],
    "model={a: {b: {name: resnet}, c: 3}}": ["model.a.c", "3"],
    "model={a: {net: {name: resnet}}, b: {net: {name: resnet}}}": ["model.b.net", "twice"],
    "objective=classification": ["objective", "{name: ..., arguments}"],
    "objective.name=clasification": ["objective.name", "did you mean 'classification'"],
    "objective.smoothing=0.1": ["objective.smoothing", "label_smoothing"],
    "optimizer.name=adamm": ["optimizer.name", "did you mean 'adam"],
    "optimizer.lr=0.1": ["optimizer.lr", "learning_rate"],
    "optimizer.learning_rate=fast": ["optimizer.learning_rate", "'fast'", "number"],
    "optimizer.learning_rate=-0.1": ["optimizer", "-0.1"],
    "optimizer.learning_rate=.inf": ["optimizer.learning_rate", "finite"],
    "optimizer.groups=stem": ["optimizer.groups", "'stem'", "list"],
    "optimizer.groups=[{mach: stem}]": ["optimizer.groups.0.mach", "did you mean 'match'"],
    "optimizer.groups=[{match: stem, frozen: 1}]": ["optimizer.groups.0.frozen", "true or false"],
    "optimizer.groups=[{match: stem, frozen: true, l1: 1}]": ["optimizer.groups.0.frozen", "l1", "no effect"],
    "optimizer.l1=-1": ["optimizer.l1", "-1"],
    "optimizer={model: {name: sgd, learning_rate: 1, groups: 3}}": ["optimizer.model.groups", "3"],
    "optimizer.learning_rate=null": ["optimizer.learning_rate", "needs"],
    "optimizer={model: {name: sgd, learning_rate: 1}, critic: {name: sgd}}": ["optimizer.critic", "model"],
    "optimizer={model: sgd}": ["optimizer.model", "'sgd'"],
    "evaluate={split: test, every: 1 epoch, metrics: [acuracy]}": ["evaluate.metrics.0", "did you mean 'accuracy'"],
    "evaluate={split: test, every: 1 epoch, metrics: [acuracy], best: accuracy, mode: max}": [
        "evaluate.metrics.0",
        "did you mean 'accuracy'",
    ],
    "evaluate.metrics=[]": ["evaluate.metrics", "[]"],
    "evaluate.metrics=[loss, loss]": ["evaluate.metrics", "once"],
    "evaluate.metrics=accuracy": ["evaluate.metrics", "list"],
    "evaluate.best=acuracy": ["evaluate.best", "did you mean 'accuracy'"],
    "evaluate.mode=null": ["evaluate.mode", "min or the max"],
    "evaluate.mode=most": ["evaluate.mode", "min or max"],
    "evaluate.weights=emma": ["evaluate.weights", "did you mean 'ema'"],
    "evaluate.every=1 epoch turns": ["evaluate.every", "steps, epochs"],
    "evaluate.split=null": ["evaluate.split", "missing"],
    "callbacks.emma={name: emma}": ["callbacks.emma.name", "did you mean 'ema'"],
    "callbacks.ema=0.9": ["callbacks.ema", "0.9", "mapping"],
    "callbacks.ema.decay=2": ["callbacks.ema", "decay", "2"],
    "callbacks.ema.players=[critic]": ["callbacks.ema.players", "'critic'", "model"],
    "callbacks.clip_gradients.norm=-1": ["callbacks.clip_gradients", "-1"],
    "callbacks.checkpoint.every=5": ["callbacks.checkpoint.every", "5 steps"],
    "callbacks.checkpoint.every=5 parsecs": ["callbacks.checkpoint.every", "5 parsecs", "epochs"],
    "callbacks.checkpoint.keep=0": ["callbacks.checkpoint", "keep"],
    "callbacks.learning_rate_decay.schedule=cosinus": ["learning_rate_decay", "did you mean 'cosine'"],
    "callbacks=[ema]": ["callbacks", "instance"],
    "callbaks.ema.decay=0.9": ["callbaks", "did you mean 'callbacks'"],
    "seed.sub=1": ["seed", "sub"],
    "duration.x=1": ["duration.x", "no keys"],
    "optimizer": ["--set optimizer", "KEY=VALUE"],
    "=3": ["--set =3", "KEY=VALUE"],
    "model=[1, 2": ["--set model", "not YAML"],
    "model=!!python/object:os.system {}": ["--set model", "tags"],
}  # fmt: skip

FILES = {
    "muon under zero": (
        GOOD.replace("strategy: single", "strategy: zero2").replace("{name: sgd", "{name: muon").encode(),
        ["strategy", "zero2", "'muon' needs each whole"],
    ),
    "empty": (b"", ["empty", "data"]),
    "comment": (b"# nothing\n", ["empty"]),
    "list": (b"- 1\n- 2\n", ["[1, 2]", "mapping"]),
    "word": (b"resnet\n", ["'resnet'", "mapping"]),
    "broken": (b"data: {name: digits\nmodel: 3\n", [":2:", "not YAML"]),
    "tab": (b"data:\n\tname: digits\n", [":2:", "not YAML"]),
    "binary": (bytes(range(128, 256)), ["not UTF-8"]),
    "control": (b"name: a\x00b\n", ["not YAML", "#x0000"]),
    "repeated key": (GOOD.encode() + b"duration: 3 steps\n", ["'duration'", "repeated"]),
    "tag": (b"data: !!python/name:os.system\n", [":1:", "tags"]),
    "key is a number": (b"1: 2\n", ["1", "key"]),
    "merge key": (b"a: &a {x: 1}\nb: {<<: *a}\n", [":2:", "<<"]),
    "two documents": (GOOD.encode() + b"---\na: 1\n", ["second document"]),
    "alias of nothing": (b"a: *b\n", [":1:", "*b"]),
    "deep": (b"a: " + b"[" * 5000, ["deep"]),
    "bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefghi"),
        ["20,000 values"],
    ),
    "huge": (b"a: " + b"x" * 1_100_000, ["1,000,000"]),
    "unknown key": (GOOD.encode() + b"optimiser: {name: sgd}\n", ["optimiser", "did you mean 'optimizer'"]),
    "no data": (b"duration: 1 epoch\n", ["data", "missing"]),
    "unknown parent": (b"extends: resnet-mnits\n", ["extends", "did you mean 'resnet-mnist'"]),
    "itself": (b"extends: ./itself.yaml\n", ["extends", "itself -> itself"]),
    "two parents": (b"extends: [resnet-mnist, wgan-gp-mnist]\n", ["extends", "one recipe"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def the_line(capsys, code):
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 600
    return lines[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting(setting, tmp_path, capsys):
    (tmp_path / "recipe-under-test.yaml").write_text(GOOD)
    line = the_line(capsys, main(["train", "recipe-under-test.yaml", "--set", setting]))
    for word in SETTINGS[setting]:
        assert word in line
    if not line.startswith("error: --set"):
        assert line.startswith("error: recipe-under-test.yaml: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", FILES)
def test_file(case, tmp_path, capsys):
    content, words = FILES[case]
    name = f"{case.replace(' ', '-')}.yaml"
    (tmp_path / name).write_bytes(content)
    line = the_line(capsys, main(["train", name]))
    for word in words:
        assert word in line
    assert line.startswith(f"error: {name}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "resnet-mnits"], ["resnet-mnits", "did you mean 'resnet-mnist'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "no such recipe"]),
        (["train", "."], ["recipe.yaml", "run directory"]),
        (["train", "resnet-mnist", "--ranks", "0"], ["--ranks"]),
        (["train", "resnet-mnist", "--ranks", "two"], ["--ranks", "integer"]),
        (["train", "resnet-mnist", "--rank", "2"], ["--rank", "--ranks"]),
        (["train", "resnet-mnist", "--resume", "auto"], ["--resume", "--run-dir"]),
        (["train"], ["RECIPE"]),
        (["trian"], ["trian"]),
        ([], ["command"]),
        (["evaluate", "nowhere"], ["nowhere", "run directory"]),
        (["checkpoint", "check", "nowhere"], ["nowhere", "checkpoint"]),
        (["shards", "show", "nowhere"], ["nowhere"]),
        (["shards", "pack", "mnist6k", "out"], ["mnist6k", "did you mean 'mnist5k'"]),
        (["list", "modle"], ["modle", "did you mean 'model'"]),
        (["new", "123"], ["123", "letter"]),
        (["new", "numpy"], ["numpy", "installed"]),
    ],
)
def test_command(arguments, words, capsys):
    line = the_line(capsys, main(arguments))
    for word in words:
        assert word.lower() in line.lower()


@pytest.mark.parametrize("setting", ["optimizer.name=sgdd", "callbacks.ema.decay=2"])
def test_as_a_process(setting, tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", "train", "r.yaml", "--set", setting],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert setting.partition(".")[0] in done.stderr


def test_there_are_many_cases():
    assert len(SETTINGS) + len(FILES) >= 60
