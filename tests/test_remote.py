"""Shards behind an address: a server on the loopback that is slow, breaks off, lies, refuses or says nothing."""

import fcntl
import hashlib
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dist_train.data import RunData
from dist_train.data_shards.cache import Cache, _locked
from dist_train.data_shards.index import Index
from dist_train.data_shards.prefetch import Prefetch, first_needs
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.remote import Patience, check_address
from dist_train.data_shards.sizes import bytes_of
from dist_train.data_shards.storage import Bucket
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.world import World

CALM = Patience(attempts=4, stall=60.0, wait=0.01)
HASTE = Patience(attempts=4, stall=0.5, wait=0.01)
"""For a server that stalls; a busy machine may take so long for what is well."""


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults[name]` is a list of what goes wrong with the next requests for that file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, {}, Counter()
        self.ranges, self.over = [], threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address) -> None:
        """Whoever asked has gone: that is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server
        name = self.path.rpartition("/")[2]
        server.asked[name] += 1
        fault = server.faults[name].pop(0) if server.faults.get(name) else ""
        path = server.folder / name
        if fault.isdecimal() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            server.ranges.append(start)
        if fault == "no ranges":
            start = 0
        content = content[start:]
        if fault == "lie":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "page":
            content = b"<html>please log in</html>" * 10
        if fault == "more":
            content += b"more"
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "stall":
            self.wfile.write(content[: len(content) // 3])
            server.over.wait(20)  # far longer than any patience here
            return
        if fault == "slow":
            for at in range(0, len(content), 1 + len(content) // 6):
                self.wfile.write(content[at : at + 1 + len(content) // 6])
                server.over.wait(0.05)
            return
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 pictures that say their number, 6 a shard; 12 to test on."""
    folder = tmp_path_factory.mktemp("remote") / "set"
    rows = [
        (split, f"{i:03d}", {"image.npy": np.full((8, 8), i, np.uint8), "cls": i % 3})
        for split, count in (("train", 60), ("test", 12))
        for i in range(count)
    ]
    write_shards(folder, "set", rows, shard_size=6)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def bucket(
    server: Server,
    tmp_path: Path,
    size: int = 1 << 30,
    index: str = "",
    patience: Patience = CALM,
) -> Bucket:
    return Bucket(server.address, Cache(tmp_path / "cache", size, patience), index)


def pictures(shards: Shards, ids: np.ndarray) -> list[int]:
    return shards.column("image", ids)[:, 0, 0].tolist()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["slow"],
        ["cut", "cut"],
        ["cut", "no ranges"],
        ["lie", "lie"],
        ["page", "more"],
        ["503", "stall"],
        ["cut", "lie", "500"],
    ],
    ids=lambda faults: "-".join(faults) or "well",
)
def test_what_a_server_may_do_and_what_arrives(server, tmp_path, faults: list[str]) -> None:
    patience = HASTE if "stall" in faults else CALM
    shards = Shards.remote(bucket(server, tmp_path, patience=patience), "train")
    name = shards.shards[3].file
    server.faults = {name: list(faults), "set-train-000005.index.npy": list(faults)}
    assert pictures(shards, np.arange(60)[::-1]) == list(range(60))[::-1]
    assert shards.where(20).startswith(f"{server.address}/set-train-000003.tar")
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    for shard in shards.shards:
        assert shard.sha256 in cached
        content = (tmp_path / "cache" / shard.sha256).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert server.asked[name] == 1 + len(
        [fault for fault in faults if fault not in ("slow", "no ranges")]
    )
    if "stall" in faults:  # it went on where that broke off (what a cut left unread may be lost)
        assert shards.shards[3].bytes // 3 in server.ranges


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (["lie"] * 9, "given up after 4 attempts: it sends another SHA-256 than the index says"),
        (["more"] * 9, "given up after 4 attempts: it sends more than"),
        (["page"] * 9, "given up after 4 attempts: the connection ended after"),
        (["stall"] * 9, "given up after 4 attempts"),
        (["503"] * 9, "given up after 4 attempts: 503"),
        (["404"], "there is no such file"),
    ],
)
def test_a_source_that_stays_away_is_an_end_in_one_line(server, tmp_path, faults, reason) -> None:
    patience = HASTE if "stall" in faults else CALM
    shards = Shards.remote(bucket(server, tmp_path, patience=patience), "train")
    server.faults = {"set-train-000000.tar": faults}
    with pytest.raises(UserError, match=f"set-train-000000.tar: {reason}") as raised:
        shards.value(0, "image")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_an_index_is_never_made_by_those_who_read(server, tmp_path, folder: Path) -> None:
    server.folder = tmp_path
    with pytest.raises(UserError, match=r"index.json: there is no such file \(an index is made"):
        Shards.remote(bucket(server, tmp_path), "train")
    server.folder = folder
    server.faults = {"index.json": ["page"]}
    with pytest.raises(UserError, match="not an index of shards"):
        Shards.remote(bucket(server, tmp_path), "train")


def test_an_index_elsewhere(server, tmp_path, folder: Path) -> None:
    """The tars behind an address, index and tables in a folder."""
    elsewhere = tmp_path / "index"
    elsewhere.mkdir()
    for path in folder.iterdir():
        if not path.name.endswith(".tar"):
            os.link(path, elsewhere / path.name)
    shards = Shards.remote(bucket(server, tmp_path, index=str(elsewhere)), "test")
    assert pictures(shards, np.arange(12)) == list(range(12))
    assert all(name.endswith(".tar") for name in server.asked)


def _read(server_address: str, cache: Cache, ids: list[int]) -> None:
    shards = Shards.remote(Bucket(server_address, cache), "train")
    assert pictures(shards, np.array(ids)) == ids


def test_the_processes_of_a_node_share_one_download(server, tmp_path, processes) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, CALM)
    server.faults = {f"set-train-{n:06d}.tar": ["slow"] for n in range(10)}
    readers = [
        processes.Process(target=_read, args=(server.address, cache, list(range(60))))
        for _ in range(3)
    ]
    for process in readers:
        process.start()
    for process in readers:
        process.join(60)
        assert process.exitcode == 0
    tars = {name: count for name, count in server.asked.items() if name.endswith(".tar")}
    assert tars == {f"set-train-{n:06d}.tar": 1 for n in range(10)}


def test_a_cache_keeps_to_its_size(server, tmp_path) -> None:
    """Half the set fits; what was mapped stays readable after it went; threads may ask at once."""
    tar = next(server.folder.glob("*.tar")).stat().st_size
    small = bucket(server, tmp_path, size=5 * tar)
    shards = Shards.remote(small, "train")
    first = shards.views("image", np.arange(60))
    with ThreadPoolExecutor(4) as pool:
        for shard in range(30):
            pool.submit(small.tar, shards.shards[shard * 7 % 10])
    kept = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 5 * tar
    assert [bytes(view)[-1] for view in first] == list(range(60))
    (tmp_path / "cache" / f"{'0' * 64}.part").write_bytes(
        bytes(4 * tar)
    )  # left by a killed process
    assert pictures(Shards.remote(small, "train"), np.arange(60)) == list(range(60))
    with pytest.raises(UserError, match=r"data.cache.size: 10 bytes, less than one file"):
        Shards.remote(bucket(server, tmp_path / "tiny", size=10), "train").value(0, "image")


def test_prefetch_goes_in_the_order_of_need_and_not_too_far(server, tmp_path) -> None:
    shards = Shards.remote(bucket(server, tmp_path), "train")
    ids = [np.array([6 * (step * 3 % 10)]) for step in range(20)]
    tar = shards.shards[0].bytes
    needed = list(first_needs(lambda step: shards.needs(ids[step]), range(20)))
    assert [step for step, _, _ in needed] == list(range(10))  # the second round is in the cache
    small = Shards.remote(bucket(server, tmp_path, size=4 * tar), "train")
    assert len(list(first_needs(lambda step: small.needs(ids[step]), range(20)))) == 20
    with Prefetch(lambda step: shards.needs(ids[step]), range(20)) as prefetch:
        prefetch.reached(3)
        wanted = [tmp_path / "cache" / shard.sha256 for shard in shards.shards]
        for path, shard in zip(wanted, shards.shards, strict=True):
            shards.storage.tar(shard)
            assert path.is_file()
    assert not prefetch._process.is_alive()


def recipe(root: Path, **data) -> Recipe:
    settings = {
        "data": {"global_batch": 12, "micro_batch": 2, "scale": "unit"} | data,
        "duration": "10 steps",
        "model": {"name": "lenet", "num_classes": "auto"},
        "objective": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
    }
    return Recipe.restore(settings, "test", root)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_fetches_its_own_part_only(server, tmp_path, ranks: int) -> None:
    """And all ranks together see what one process sees from the folder in the same order."""
    data = {"path": server.address, "cache": {"dir": "cache", "size": "1 GiB"}}
    local = {"path": str(server.folder), "shuffle": "window", "streams": 12}
    parts = []
    for rank in range(ranks):
        world = World(rank=rank, size=ranks)
        own = recipe(tmp_path / str(rank), **data)
        parts.append(dict(RunData(own, world).batches.from_(0, 5)))
        tars = [
            p
            for p in (tmp_path / str(rank) / "cache").iterdir()
            if p.is_file() and p.stat().st_size > 5000
        ]
        assert len(tars) <= 10 // ranks + 2
    whole = dict(RunData(recipe(tmp_path, **local), World()).batches.from_(0, 5))
    for step in range(5):
        got = np.concatenate([micro.ids for part in parts for micro in part[step]])
        assert np.array_equal(got, np.concatenate([micro.ids for micro in whole[step]]))
        shown = np.concatenate([m["image"][:, 0, 0, 0] * 255 for part in parts for m in part[step]])
        assert np.array_equal(shown.round(), got)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "pipe:cat x://y",
        "http://example.org/set",
        "https://user:key@host/set",
        "https://host/set?x=1",
        "https://host/a/../b",
        "https:///set",
        "memory://set",
        "simplecache::https://host/set",
    ],
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="expected"):
        check_address(address)


def test_sizes() -> None:
    assert bytes_of("64 GiB") == 64 << 30 and bytes_of("3MiB") == 3 << 20
    for size in ("64", "0 GiB", "-1 GiB", "GiB", "1.5 GiB"):
        with pytest.raises(UserError, match="expected one like"):
            bytes_of(size)


def test_the_shards_of_a_large_split_are_fetched_too(server: Server, tmp_path: Path) -> None:
    """Another content than the index names, and then the right one."""
    index = Index.read(server.folder)
    copy = tmp_path / "copy"
    shutil.copytree(server.folder, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_train.data_shards.index.LARGE", 3)
        index.save(copy)
    server.folder = copy
    server.faults = {"index.train.npy": ["lie"]}
    shards = Shards.remote(bucket(server, tmp_path), "train")
    assert server.asked["index.train.npy"] == 2 and server.asked["index.json"] == 1
    assert pictures(shards, np.arange(60)) == list(range(60))
    assert shards.index == Index.read(copy) and len(shards.needs(np.arange(60))) == 10


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for open files in /proc")
def test_a_lock_is_free_though_a_fork_holds_a_copy(tmp_path: Path) -> None:
    """A process that was forked while another thread fetched has its files open, until the end of the epoch."""
    with _locked(tmp_path / "lock"):
        held = [int(file.name) for file in Path("/proc/self/fd").iterdir() if _is(file, tmp_path)]
        copies = [os.dup(descriptor) for descriptor in held]
    try:
        assert copies
        with (tmp_path / "lock").open() as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for copy in copies:
            os.close(copy)


def _is(link: Path, folder: Path) -> bool:
    try:
        return os.readlink(link).startswith(str(folder))
    except FileNotFoundError:
        return False
