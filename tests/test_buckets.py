"""Shards behind s3:// and gs://, through their own clients, from a server of each on the loopback."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards.cache import Cache
from dist_train.data_shards.index import sidecar
from dist_train.data_shards.loader import training_batches
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.remote import Patience, _filesystem
from dist_train.data_shards.shard_loader import ShardLoader
from dist_train.data_shards.storage import Bucket
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError

HASTE = Patience(attempts=2, stall=5.0, wait=0.01)


def need(name: str, *modules: str) -> None:
    if name not in os.environ.get("DIST_TRAIN_TESTS_MUST_HAVE", ""):
        for module in modules:
            pytest.importorskip(module)


@pytest.fixture(scope="module", params=["s3", "gs"])
def protocol(request) -> Iterator[str]:
    """A server that speaks it, which the protocol's own client finds by its own settings."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("NO_PROXY", "127.0.0.1")
        if request.param == "s3":
            need("s3", "s3fs", "moto", "flask", "flask_cors")
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            environ.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            environ.setenv("AWS_DEFAULT_REGION", "us-east-1")
            environ.setenv("AWS_ACCESS_KEY_ID", "nobody")
            environ.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        else:
            need("gs", "gcsfs", "gcp_storage_emulator")
            environ.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google otherwise
            from gcp_storage_emulator.server import create_server

            server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
            server.start()
            environ.setenv(
                "STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}"
            )
        yield request.param
        server.stop()


@pytest.fixture(scope="module")
def places(protocol: str, tmp_path_factory) -> tuple[Path, str]:
    """(a folder of 60 samples, 6 a shard; the address of the same in a bucket)."""
    folder = tmp_path_factory.mktemp("local") / "set"
    rows = [
        ("train", f"{i:03d}", {"x.npy": np.full(300, i, np.int16), "cls": i % 3}) for i in range(60)
    ]
    write_shards(folder, "set", rows, shard_size=6)
    client = _filesystem(protocol, HASTE.stall)
    if protocol == "s3":
        client.mkdir("bucket")
    for file in folder.iterdir():
        client.pipe(f"bucket/pets/set/{file.name}", file.read_bytes())
    return folder, f"{protocol}://bucket/pets/set"


def test_a_bucket_holds_what_the_folder_holds(places: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = places
    bucket = Bucket(address, Cache(tmp_path / "cache", 1 << 30, HASTE))
    elsewhere, here = Shards.remote(bucket, "train"), Shards(folder, "train")
    assert elsewhere.index.fingerprint == here.index.fingerprint
    order = elsewhere.order(0, 12)
    batches = [
        training_batches(shards, seed=0, global_batch=12, micro_batch=12, order=order)
        for shards in (elsewhere, here)
    ]
    for (step, (theirs,)), (_, (ours,)) in zip(*(one.from_(0, 6) for one in batches), strict=True):
        assert (theirs["x"] == ours["x"]).all() and (theirs["label"] == ours["label"]).all(), step
    assert elsewhere.key(17) == "017"


def test_a_loader_of_two_ranks_reads_a_bucket(places: tuple[Path, str], tmp_path: Path) -> None:
    _, address = places
    kept = {"cache": tmp_path / "cache", "cache_size": "1 MiB"}
    ranks = [
        ShardLoader(address, global_batch=12, rank=rank, world_size=2, **kept) for rank in (0, 1)
    ]
    seen = [i for loader in ranks for batch in loader for i in batch["x"][:, 0].tolist()]
    assert sorted(seen) == list(range(60))


def test_what_is_wrong_with_a_bucket_is_said(places: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = places
    protocol = address.partition(":")[0]
    bucket = Bucket(address, Cache(tmp_path / "cache", 1 << 30, HASTE))
    shards = Shards.remote(bucket, "train")
    name = shards.shards[2].file
    client = _filesystem(protocol, HASTE.stall)
    try:
        whole = (folder / name).read_bytes()
        client.pipe(f"bucket/pets/set/{name}", whole[:-1] + b"x")
        with pytest.raises(UserError, match=rf"{name}: given up after 2 attempts: .*SHA-256"):
            shards.sample(12)
        client.pipe(f"bucket/pets/set/{name}", whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{name}: given up after 2 attempts: .*ended after"):
            shards.sample(12)
        client.rm(f"bucket/pets/set/{name}")
        with pytest.raises(UserError, match=f"{name}: there is no such file"):
            shards.sample(12)
    finally:
        client.pipe(f"bucket/pets/set/{name}", whole)
    assert shards.sample(12)["label"] == 0
    table = sidecar(Path(shards.shards[3].file)).name
    with pytest.raises(UserError, match=r"index.json: there is no such file .*shards index FOLDER"):
        Shards.remote(Bucket(f"{protocol}://bucket/none", bucket.cache), "train")
    assert bucket.table(shards.shards[3], (folder / table).stat().st_size).is_file()
