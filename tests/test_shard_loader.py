"""The loader in any PyTorch loop: killed and brought back on other ranks and workers it gives the same batches."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data_shards import ShardLoader, Shards, evaluation_batches, write_shards
from dist_train.errors import UserError
from dist_train.metrics import Metric

SIZES = {(1, 1): "a", (7, 3): "b", (23, 4): "c", (60, 60): "d", (61, 1): "e"}
"""(samples, samples a shard) of the sets."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sets of samples whose field `x` says which they are."""
    root = tmp_path_factory.mktemp("loader")
    for (count, shard_size), name in SIZES.items():
        rows = (("train", f"{i:04d}", {"x.npy": np.array([i]), "cls": i % 2}) for i in range(count))
        write_shards(root / name, name, rows, shard_size=shard_size)
    return root


def drawn(loaders: list[ShardLoader], steps: int) -> list[list[int]]:
    """The next global batches: the rows of all ranks, by what they say."""
    batches: list[list[int]] = [[] for _ in range(steps)]
    for loader in loaders:
        got = 0
        while got < steps:
            for batch in loader:
                batches[got] += batch["x"][:, 0].tolist()
                got += 1
                if got == steps:
                    break
    return batches


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.sampled_from(sorted(SIZES)),
    rows=st.integers(1, 3),
    shuffle=st.sampled_from(["global", "window", "none"]),
    streams=st.sampled_from([1, 2, 6]),
    bootstrap=st.sampled_from([None, None, 3]),
    legs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 9)), min_size=1, max_size=4
    ),
)
def test_any_kills_and_any_ranks(root, size, rows, shuffle, streams, bootstrap, legs) -> None:
    """Each leg ends with a kill, and the next one starts on other ranks from the state of any rank."""

    def loaders(ranks: int) -> list[ShardLoader]:
        return [
            ShardLoader(
                root / SIZES[size],
                global_batch=12 * rows,
                seed=5,
                rank=rank,
                world_size=ranks,
                shuffle=shuffle,
                window=2,
                streams=streams,
                bootstrap=bootstrap,
            )
            for rank in range(ranks)
        ]

    total = sum(steps for _, steps in legs)
    unbroken = drawn(loaders(1), total)
    state, got = None, []
    for ranks, steps in legs:
        here = loaders(ranks)
        for loader in here:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        got += drawn(here, steps)
        states = {json.dumps(loader.state_dict()) for loader in here}
        assert len(states) == 1
        (state,) = states
    assert got == unbroken
    if bootstrap is None:
        seen = np.concatenate(unbroken)
        for epoch in range(len(seen) // size[0]):
            own = seen[epoch * size[0] : (epoch + 1) * size[0]]
            assert np.array_equal(np.sort(own), np.arange(size[0]))


@pytest.mark.parametrize("size", [(7, 3), (1, 1), (61, 1)])
def test_fewer_shards_than_ranks_times_workers(root: Path, size: tuple[int, int]) -> None:
    """Workers change nothing, epochs end together on all ranks, and the workers of one loader persist."""

    def loaders(ranks: int, workers: int) -> list[ShardLoader]:
        path = root / SIZES[size]
        return [
            ShardLoader(path, global_batch=4, rank=rank, world_size=ranks, workers=workers)
            for rank in range(ranks)
        ]

    alone = loaders(1, 0)
    together = loaders(2, 2)
    for epoch in range(3):
        assert {loader.epoch for loader in alone + together} == {
            epoch * 1 if size[0] > 3 else alone[0].epoch
        }
        assert len({len(loader) for loader in alone + together}) == 1
        steps = len(alone[0])
        assert drawn(together, steps) == drawn(alone, steps)
    workers = [loader.batches._ahead._loader._iterator._workers for loader in together]
    assert all(worker.is_alive() for own in workers for worker in own)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_metrics_do_not_depend_on_the_ranks(root: Path, ranks: int) -> None:
    """Accuracy of a fixed guess over 23 samples, exactly, whatever the ranks and the padding."""
    from dist_train.metrics import accuracy

    metric, sums = Metric.wrap(accuracy, "accuracy"), []
    for rank in range(ranks):
        metric.reset()
        shards = Shards(root / "c", "train")
        for micro in evaluation_batches(shards, micro_batch=4, rank=rank, world_size=ranks):
            guesses = torch.nn.functional.one_hot((micro["x"][:, 0] % 3).clamp(max=1), 2)
            metric.update({"logits": guesses.float()}, micro)
        sums.append(metric.sums())
    value = metric.finish(*torch.stack(sums).sum(0).tolist())
    assert value == pytest.approx(np.mean([min(i % 3, 1) == i % 2 for i in range(23)]), abs=1e-12)


def test_a_state_of_another_loader_is_refused(root: Path) -> None:
    loader = ShardLoader(root / "c", global_batch=6)
    state = ShardLoader(root / "c", global_batch=6, seed=1).state_dict()
    with pytest.raises(UserError, match="of a loader with seed 1, this one has 0"):
        loader.load_state_dict(state)
    with pytest.raises(UserError, match="with fingerprint"):
        loader.load_state_dict(ShardLoader(root / "d", global_batch=6).state_dict())
    with pytest.raises(UserError, match="does not share out over 4 ranks"):
        ShardLoader(root / "c", global_batch=6, rank=0, world_size=4)
    with pytest.raises(UserError, match="give both or neither"):
        ShardLoader(root / "c", global_batch=6, rank=0)


def test_the_example_of_the_documents(tmp_path: Path) -> None:
    """The 10 lines of docs/shards.md run as they stand, killed after some steps and brought back."""
    text = (Path(__file__).parents[1] / "docs" / "shards.md").read_text()
    write, loop = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    setup = "import numpy as np\narrays, labels = np.random.default_rng(0).random((500, 3)), [0, 1] * 250\n"
    (tmp_path / "write.py").write_text(setup + write)
    (tmp_path / "loop.py").write_text(loop)
    for script in ("write.py", "loop.py", "loop.py"):
        command = [sys.executable, script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    steps = -(-2 * len(Shards(tmp_path / "data" / "mine", "train")) // 32)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["data"]["step"] == steps


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from dist_train.data_shards import Shards
shards = Shards(sys.argv[1], "train")
assert shards.column("x", np.arange(61)).ravel().tolist() == list(range(61))
from dist_train.data_shards import ShardLoader
loader = ShardLoader(sys.argv[1], global_batch=12, workers=2)
print(sorted(i for batch in loader for i in batch["x"].ravel().tolist())[:61])
"""


def test_few_open_files_are_enough(root: Path) -> None:
    """61 shards with at most 64 open files; workers would need more, so there are none, and a line says so."""
    command = [sys.executable, "-c", LIMITED, str(root / "e")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "open files are needed, 64 are allowed" in done.stderr


def test_mapped_shards_keep_no_file_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shards = Shards(root / "e", "train")
    shards.column("x", np.arange(61))
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


SMALL = """
mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" -c '
import sys
from dist_train.data_shards import ShardLoader
loader = ShardLoader(sys.argv[1], global_batch=6000, workers=2)
print(len([batch for batch in loader]))' "$1"
"""


def test_little_shared_memory_is_said_and_gone_without(root: Path) -> None:
    """In a mount namespace of its own, where that is allowed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("no mount namespaces here")
    command = ["unshare", "-m", "sh", "-c", SMALL, sys.executable, str(root / "e")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    assert "of shared memory are needed" in done.stderr and "--shm-size" in done.stderr
