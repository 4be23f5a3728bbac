"""A real Slurm on this machine: a controller and two nodes on loopback, all of it children of this process.

Each node is a namespace of its own for processes, host name and mounts. To crash it is to kill the first process of
that namespace: the kernel then kills slurmd, its step daemons and every task with it, as a power cut would.
Needs root, and Debian's munge, slurmctld, slurmd and slurm-client.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train.ranks.parent import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
SlurmdTimeout=5
MessageTimeout=5
KillWait=20
MinJobAge=600
InactiveLimit=0
WaitTime=0
NodeName=n1 NodeHostName=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostName=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE DefaultTime=60 PriorityTier=9 PreemptMode=OFF
"""
# cred_expire is also how long a requeued job waits before it may start again

NODE = """
hostname "$1"
mount --bind "$3" /etc/hosts
slurmd -D -f "$2" -N "$1" &
wait "$!"
"""
"""The first process of a node's namespace: it stays, to reap what slurmd leaves."""


def missing() -> str:
    """Why there can be no cluster on this machine; "" where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    return f"lacks {', '.join(lacking)}" if lacking else ""


class Cluster:
    """`with Cluster(folder).running() as cluster`. Its clients need `cluster.environ`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "slurm.conf"
        self.environ = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        with held_ports(3) as ports:
            try:
                self._up(ports)
                yield self
            finally:
                self._down()

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=30, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def crash(self, node: str) -> None:
        """Cut the power of a node."""
        self._stop(node, signal.SIGKILL)

    def start(self, node: str) -> None:
        """Switch a node on."""
        arguments = ("--pid", "--fork", "--kill-child", "--uts", "--mount", "--mount-proc")
        self._start(
            node,
            *("unshare", *arguments, "--", "bash", "-c", NODE),
            *("bash", node, str(self.conf), str(self.root / "hosts")),
        )

    def state(self, job: str) -> str:
        """A job's state in one word, "" once it is forgotten."""
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).strip()

    def _up(self, ports: list[int]) -> None:
        for folder in ("state", "spool-n1", "spool-n2"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "key").write_bytes(os.urandom(128))
        (self.root / "key").chmod(0o400)
        names = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        host = socket.gethostname().partition(".")[0]
        self.conf.write_text(CONF.format(root=self.root, host=host, ports=ports))
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"seed-file": "munged.seed", "log-file": "munged.log"}
        places = [f"--{name}={self.root / file}" for name, file in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *places)
        wait_for(lambda: (self.root / "munge.socket").exists(), "munged")
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self.start(node)
        wait_for(lambda: self.idle() == len(NODES), "two idle nodes")

    def idle(self) -> int:
        """How many nodes could take a job."""
        shown = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False)
        return shown.split().count("idle")

    def _start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _stop(self, name: str, number: int) -> None:
        process = self._daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _down(self) -> None:
        for name in [name for name in NODES if name in self._daemons]:
            self._stop(name, signal.SIGKILL)
        for name in list(self._daemons):
            self._stop(name, signal.SIGTERM)


def processes_of(run_dir: Path) -> list[int]:
    """Other processes that have the run's directory in their environment or command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            if int(folder.name) != os.getpid() and str(run_dir).encode() in told:
                found.append(int(folder.name))
    return found


def wait_for(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Look until it is true; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports of loopback that are taken, so that the kernel gives them to nobody else, but not listened at: Linux lets
    whoever says SO_REUSEADDR, as servers do, listen there."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]
