"""`--on ray`: a job of a Ray cluster whose ranks are actors in a placement group. The only file that knows Ray.

The job is a driver on the cluster (`drive`): it reserves the nodes, starts the ranks, and starts them again from the
last checkpoint when one is lost. An actor starts its rank as a process of its own, as Slurm and torchrun do, so that a
run is the same run wherever it is.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError
from dist_train.launch.backend import Backend, Job, Status, travelling
from dist_train.launch.spec import Spec
from dist_train.restarts import begin_to_count, may_restart
from dist_train.run_directory import SECRET_NAME

DASHBOARD = "http://127.0.0.1:8265"
CANCEL = "logs/cancel"
"""Its presence in the run directory asks the driver to let the ranks save and end."""
LOST = -1
"""The exit code of a rank whose node or actor is gone."""
STATES = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done", "STOPPED": "cancelled"}
MISTAKE, REQUEUE = 2, 75


class Ray(Backend):
    """Submits through the Jobs API of the cluster at RAY_API_SERVER_ADDRESS, with a token, never without one."""

    takes = frozenset({"nodes", "gpus_per_node", "ranks_per_node", "cpus_per_rank"})

    def check(self, job: Job, dry_run: bool) -> None:
        check_python()
        check_token(os.environ)
        if not dry_run:
            check_cluster(address(os.environ))

    def render(self, job: Job) -> dict[str, str]:
        return {"logs/job.txt": shlex.join(_driver(job)) + "\n"}

    def submit(self, job: Job) -> str:
        (job.run_dir / CANCEL).unlink(missing_ok=True)
        return _client().submit_job(
            entrypoint=shlex.join(_driver(job)),
            runtime_env={"env_vars": exported(job)},
            metadata={"name": job.name},
        )

    def status(self, job: Job) -> Status:
        try:
            info = _client().get_job_info(job.id)
        except (ConnectionError, RuntimeError) as error:
            return Status("unknown", str(error).partition("\n")[0])
        state = STATES.get(info.status.value, "failed")
        if info.driver_exit_code == REQUEUE:
            state = "interrupted"
        return Status(state, (info.message or "").partition("\n")[0])

    def cancel(self, job: Job) -> None:
        state = self.status(job).state
        if state not in ("waiting", "running"):
            raise UserError(f"{job.run_dir}: is not running ({state})")
        (job.run_dir / CANCEL).touch()


def exported(job: Job) -> dict[str, str]:
    """The variables that travel to the cluster. Ray shows them to whoever can see its dashboard: what is secret is set
    where the cluster starts."""
    names = [name for name in travelling(job.spec.env) if not SECRET_NAME.search(name)]
    variables = {name: os.environ[name] for name in names if name not in ("PATH", "HOME")}
    return variables | job.environ()


def _driver(job: Job) -> list[str]:
    return [job.python, "-m", "dist_train.launch.ray", str(job.run_dir)]


# ---------------------------------------------------------------------------------------------------------------------
# The cluster, and who may use it


def address(environ: Mapping[str, str]) -> str:
    """Where the Jobs API is, as `ray job submit` finds it."""
    return environ.get("RAY_API_SERVER_ADDRESS", DASHBOARD)


def check_python() -> None:
    """Raise UserError where Ray is not installed, or cannot start workers."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--on ray: needs Ray: pip install 'dist-train[ray]'")
    if " " in sys.executable:  # Ray hands its workers' command to a shell unquoted
        raise UserError(
            f"--on ray: Ray cannot start workers from a path with a space ({sys.executable});"
            " install into another folder"
        )


def check_token(environ: Mapping[str, str]) -> None:
    """Raise UserError without a token, or with one that others can read."""
    if environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise UserError(
            f"RAY_AUTH_MODE={environ['RAY_AUTH_MODE']}: expected token, without it anyone could run code there"
        )
    if environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file():
        raise UserError(
            f"{file}: no such file, expected the token of the cluster there or in RAY_AUTH_TOKEN"
            " (`ray get-auth-token --generate` makes one)"
        )
    if file.stat().st_mode & 0o077:
        raise UserError(f"{file}: others can read this token; chmod 600 {shlex.quote(str(file))}")


def check_cluster(url: str) -> None:
    """Raise UserError where no cluster answers, or one that answers without a token."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise UserError(f"RAY_API_SERVER_ADDRESS={url}: expected a URL like {DASHBOARD}")
    try:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise UserError(
            f"{url}: answers with status {error.code}, expected a Ray cluster"
        ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url}: no Ray cluster answers ({reason}); RAY_API_SERVER_ADDRESS says where it is"
        ) from None
    raise UserError(
        f"{url}: this cluster takes jobs from anyone; start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    )


def _client() -> Any:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address(os.environ))


# ---------------------------------------------------------------------------------------------------------------------
# On the cluster


class Rank:
    """An actor: one rank, as a process that ends with it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as server:
            return host, server.getsockname()[1]

    def start(self, command: Sequence[str], environ: Mapping[str, str], log: str) -> None:
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def poll(self, seconds: float) -> int | None:
        """The exit code, None while the rank runs; waits up to `seconds` for it."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: int) -> None:
        """Send a signal to the rank; return when it was SIGKILL and the rank is gone."""
        if self.process is not None:
            self.process.send_signal(number)
            if number == signal.SIGKILL:
                self.process.wait()


def drive(job: Job, say: Callable[[str], None]) -> int:
    """Train on the cluster to the end; the exit code of the run."""
    import ray

    ray.init(address="auto", log_to_driver=False)
    return see_through(job, say)[0]


def see_through(job: Job, say: Callable[[str], None], group: Any = None) -> tuple[int, str]:
    """Train to the end, in a given placement group or one of its own; the exit code of the run, and what ended it."""
    begin_to_count(job.run_dir)
    while True:
        if _cancelled(job):
            return REQUEUE, "cancelled before it began"
        code, reason = _attempt(job, say, group)
        if code in (0, MISTAKE):
            return code, reason
        if _cancelled(job):
            return REQUEUE, reason
        if not may_restart(job.run_dir, job.spec.max_restarts):
            say(f"giving up: {reason}, and no start brought a newer checkpoint")
            return 1, reason
        say(f"starting again after: {reason}")


def bundles(spec: Spec) -> list[dict[str, float]]:
    """What a run takes of each of its nodes."""
    bundle: dict[str, float] = {"CPU": (spec.cpus_per_rank or 1) * spec.local_ranks}
    if spec.gpus_per_node:
        bundle["GPU"] = spec.gpus_per_node
    return [bundle] * spec.nodes


def _attempt(job: Job, say: Callable[[str], None], given: Any = None) -> tuple[int, str]:
    """Start the ranks once and wait for them; the exit code, and what ended them."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    spec = job.spec
    cpus = spec.cpus_per_rank or 1
    group = given or placement_group(bundles(spec), strategy="STRICT_SPREAD")
    ranks: list[Any] = []
    try:
        if not _granted(job, group, say):
            return REQUEUE, "cancelled while it waited for nodes"
        options = {"num_cpus": cpus, "num_gpus": spec.gpus_per_node / spec.local_ranks}
        for number in range(spec.ranks):
            place = {
                "placement_group": group,
                "placement_group_bundle_index": number // spec.local_ranks,
            }
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(**place)
            actor = ray.remote(Rank).options(**options, scheduling_strategy=strategy)
            ranks.append(actor.remote())
        host, port = ray.get(ranks[0].address.remote())
        say(f"{spec.ranks} ranks on {spec.nodes} nodes, rank 0 at {host}")
        ray.get(
            [
                rank.start.remote(
                    job.train_command(), _environ(job, number, host, port), str(job.log)
                )
                for number, rank in enumerate(ranks)
            ]
        )
        return _await(job, ranks)
    except ray.exceptions.RayError as error:
        return LOST, f"a rank was lost before it began ({type(error).__name__})"
    finally:
        _end(ranks)
        if given is None:
            remove_placement_group(group)


def _granted(job: Job, group: Any, say: Callable[[str], None]) -> bool:
    """Wait for the nodes; False when the job was cancelled meanwhile."""
    import ray

    asked, told = group.ready(), False
    while not ray.wait([asked], timeout=2)[0]:
        if _cancelled(job):
            return False
        if not told:
            say(f"waiting for {job.spec.nodes} nodes with {group.bundle_specs[0]} each")
        told = True
    return True


def _environ(job: Job, number: int, host: str, port: int) -> dict[str, str]:
    """What tells a rank its place, as torchrun does."""
    local = job.spec.local_ranks
    return {
        "RANK": str(number),
        "WORLD_SIZE": str(job.spec.ranks),
        "LOCAL_RANK": str(number % local),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": str(number // local),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        **job.environ(),
    }


def _await(job: Job, ranks: Sequence[Any]) -> tuple[int, str]:
    """Until all ranks have ended well, or one has not."""
    cancelling = False
    while True:
        codes = _codes(ranks)
        bad = {number: code for number, code in codes.items() if code not in (0, None)}
        if bad:
            codes = _codes(
                ranks
            )  # a moment later: the first to fall may not be the first that was asked
            return _verdict(codes)
        if all(code == 0 for code in codes.values()):
            return 0, "done"
        if _cancelled(job) and not cancelling:
            cancelling = True
            for rank in ranks:
                rank.send.remote(signal.SIGTERM)


def _codes(ranks: Sequence[Any]) -> dict[int, int | None]:
    """The exit code of each rank: None of one that runs, LOST of one whose actor is gone."""
    import ray

    asked = [rank.poll.remote(0.5) for rank in ranks]
    codes: dict[int, int | None] = {}
    for number, answer in enumerate(asked):
        try:
            codes[number] = ray.get(answer)
        except ray.exceptions.RayError:
            codes[number] = LOST
    return codes


def _verdict(codes: Mapping[int, int | None]) -> tuple[int, str]:
    """The exit code of a start that has ended, and why: a lost rank explains the others, and a killed one."""
    fallen = {number: code for number, code in codes.items() if code not in (0, None)}
    number, code = min(fallen.items(), key=lambda item: (item[1] != LOST, item[1] > 0, item[0]))
    if code == LOST:
        return LOST, f"rank {number}: its node is gone"
    if code < 0:
        return LOST, f"rank {number} was ended by {signal.Signals(-code).name}"
    return code, f"rank {number} ended with exit code {code}"


def _end(ranks: Sequence[Any]) -> None:
    """Leave no rank behind: the run directory must be free for the next start."""
    import ray

    ray.wait(
        [rank.send.remote(signal.SIGKILL) for rank in ranks], num_returns=len(ranks), timeout=20
    )
    for rank in ranks:
        ray.kill(rank)


def _cancelled(job: Job) -> bool:
    return (job.run_dir / CANCEL).exists()


def main(run_dir: str) -> int:
    """The driver of a submitted job."""
    job = Job.read(Path(run_dir))

    def say(text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} ray: {text}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with job.log.open("a") as file:
            file.write(line)

    return drive(job, say)


if __name__ == "__main__":
    # under its own name, or Ray would send this file's classes to the nodes as bytes instead of by name
    from dist_train.launch import ray as this

    sys.exit(this.main(sys.argv[1]))
