"""Where the ranks of a run find each other, and who has not come."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

POLL = timedelta(seconds=0.2)
LOOPBACK = ("127.", "localhost", "::1")


class RendezvousError(RuntimeError):
    """The ranks of a run did not come together."""


def meet(environ: Mapping[str, str], rank: int, size: int, limit: timedelta) -> Store:
    """A store that every rank has reached within `limit`: a file of ours, torchrun's, or rank 0's at MASTER_ADDR.

    Raises RendezvousError, which names the address and the ranks that are missing.
    """
    import torch.distributed as dist

    if size == 1:
        return dist.HashStore()
    if "DIST_TRAIN_RENDEZVOUS" in environ:
        place = environ["DIST_TRAIN_RENDEZVOUS"]
        return _wait_for_all(dist.FileStore(place, size), place, rank, size, limit)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it has seen all agents itself
        return next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))[0]
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    place = f"MASTER_ADDR {address or 'unset'}, MASTER_PORT {port or 'unset'}"
    if not address or not port.isdecimal():
        raise RendezvousError(f"{place}: expected the address of rank 0, which is one of {size}")
    if on_one_machine(environ) and not address.startswith(LOOPBACK):
        address = "127.0.0.1"
    try:
        store = dist.TCPStore(
            address,
            int(port),
            size,
            rank == 0,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=_listen(address, int(port), size) if rank == 0 else None,
        )
    except (dist.DistError, OSError) as error:
        reason = str(error).partition("\n")[0]
        what = "cannot listen there" if rank == 0 else "does not reach rank 0"
        raise RendezvousError(
            f"{place}: rank {rank} on {socket.gethostname()} {what}: {reason}"
        ) from None
    return _wait_for_all(store, place, rank, size, limit)


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether the launcher says that all ranks are on this machine, and so need no address but loopback."""
    return (
        "DIST_TRAIN_RENDEZVOUS" in environ
        or environ.get("LOCAL_WORLD_SIZE", "") == environ.get("WORLD_SIZE")
        or environ.get("MASTER_ADDR", "").startswith(LOOPBACK)
    )


def _listen(address: str, port: int, backlog: int) -> int | None:
    """A socket that listens at the one address that ranks are told, for a store takes orders from whoever reaches it.

    None, and torch listens on every interface, where this machine does not know itself by that address: behind a
    translated one, or where its own name means loopback to it, but not to the others.
    """
    family, _, _, _, at = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    host = str(at[0])
    if host.startswith(LOOPBACK) and not address.startswith(LOOPBACK):
        return None
    try:
        return socket.create_server((host, port), family=family, backlog=backlog).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise


def share_a_gpu(store: Store, size: int, gpu: str) -> bool:
    """Whether any two ranks of the world have the same GPU; `gpu` is the name of this rank's, unlike any other.

    NCCL refuses that. gloo takes the tensors through the host: slow, but one GPU can prove with `verify --ranks 2` what
    several would compute.
    """
    if store.add(f"gpu/{gpu}", 1) > 1:
        store.set("gpu/shared", "")
    if store.add("gpu/told", 1) == size:
        store.set("gpu/all", "")
    store.wait(["gpu/all"])
    return store.check(["gpu/shared"])


def _wait_for_all(store: Store, place: str, rank: int, size: int, limit: timedelta) -> Store:
    """Every rank leaves its name; rank 0 says when all have, or who has not."""
    store.set(f"here/{rank}", socket.gethostname())
    waiting, deadline = set(range(size)), time.monotonic() + limit.total_seconds()
    while rank == 0 and waiting:
        waiting = {other for other in waiting if not store.check([f"here/{other}"])}
        if waiting and time.monotonic() > deadline:
            store.set("missing", ", ".join(map(str, sorted(waiting))))
            break
        time.sleep(POLL.total_seconds() if waiting else 0)
    if rank == 0 and not waiting:
        store.set("missing", "")
    try:
        store.wait(["missing"], limit + timedelta(seconds=5))
        missing = store.get("missing").decode()
    except (RuntimeError, ValueError):
        missing = "0"
    if missing:
        raise RendezvousError(
            f"{place}: rank {missing} of {size} not there within {limit.total_seconds():g} s"
        )
    return store
