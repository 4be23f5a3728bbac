"""Ranks that do not come together say where, and who is missing, within the limit."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from slurm_cluster import held_ports

from dist_train.rendezvous import RendezvousError, meet, share_a_gpu

LIMIT = timedelta(seconds=1)


@pytest.fixture
def port() -> Iterator[int]:
    """One at which nobody listens, and that the kernel gives to nobody else meanwhile."""
    with held_ports(1) as ports:
        yield ports[0]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def at(port: int) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_missing_ranks_are_named(port: int) -> None:
    with pytest.raises(RendezvousError, match=r"rank 1, 2 of 3 not there within 1 s"):
        meet(at(port), 0, 3, LIMIT)


def test_missing_ranks_are_named_through_a_file(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match=r"rank 1 of 2 not there within 1 s"):
        meet({"DIST_TRAIN_RENDEZVOUS": str(tmp_path / "file")}, 0, 2, LIMIT)


def test_a_port_in_use_is_named(taken: int) -> None:
    with pytest.raises(RendezvousError, match=f"MASTER_PORT {taken}: rank 0 on .* cannot listen"):
        meet(at(taken), 0, 2, LIMIT)


def test_an_address_without_rank_0_is_named(port: int) -> None:
    with pytest.raises(RendezvousError, match=f"MASTER_PORT {port}: rank 1 on .* does not reach"):
        meet(at(port), 1, 2, LIMIT)


@pytest.mark.parametrize(
    "environ", [{}, {"MASTER_ADDR": "x"}, {"MASTER_ADDR": "x", "MASTER_PORT": "y"}]
)
def test_an_address_must_be_given(environ: dict[str, str]) -> None:
    with pytest.raises(RendezvousError, match="expected the address of rank 0, which is one of 2"):
        meet(environ, 0, 2, LIMIT)


def test_all_that_come_get_the_store(port: int) -> None:
    stores = {}
    others = [
        threading.Thread(target=lambda r=r: stores.update({r: meet(at(port), r, 3, 20 * LIMIT)}))
        for r in (1, 2)
    ]
    for other in others:
        other.start()
    stores[0] = meet(at(port), 0, 3, 20 * LIMIT)
    for other in others:
        other.join(timeout=30)
    stores[2].set("word", "heard")
    assert stores[1].get("word") == b"heard"


def listening(port: int) -> set[str]:
    """The addresses at which anything on this machine listens at a port, as /proc writes them."""
    found = set()
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if int(number, 16) == port and line.split()[3] == "0A":
                found.add(address)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for sockets in /proc")
@pytest.mark.parametrize(
    "told",
    [
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_ADDR": socket.gethostname(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_only_this_machine_reaches_the_store_of_its_ranks(port: int, told: dict[str, str]) -> None:
    """torch itself would listen at every address of the machine."""
    environ = told | {"MASTER_PORT": str(port)}
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda rank: meet(environ, rank, 2, 20 * LIMIT), range(2)))
    assert listening(port) == {"0100007F"}
    stores[1].set("word", "heard")
    assert stores[0].get("word") == b"heard"


@pytest.mark.parametrize(("gpus", "shared"), [("abc", False), ("aba", True), ("a", False)])
def test_ranks_that_share_a_gpu_all_know_it(gpus: str, shared: bool) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(len(gpus)) as ranks:
        assert set(ranks.map(lambda gpu: share_a_gpu(store, len(gpus), gpu), gpus)) == {shared}
