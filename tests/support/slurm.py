"""A real SLURM cluster on this machine, as a context manager (see minislurm.sh beside this file).

    with slurm_cluster(num_nodes=2) as cluster:
        job = cluster.submit("slurm/pretrain.sbatch", "run.yaml", "runs/a")
        cluster.wait(job, timeout_seconds=60).check()

The cluster ends with the `with` block, and also when this process is killed: its supervisor waits
for the end of a pipe that only this process holds.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import ROOT, clean_environment
from tests.support.ports import free_ports

_HERE = Path(__file__).resolve().parent
_FINISHED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)
_STOP_SECONDS, _COMMAND_SECONDS = 30.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the controller says about a job."""

    job_id: int
    """Number of the job."""
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
    exit_code: str
    """Exit status and signal, `0:0` for success."""
    output_file: Path
    """Where the batch script's own output goes."""

    @property
    def finished(self) -> bool:
        """It will not run again by itself."""
        return self.state in _FINISHED

    def output(self) -> str:
        """The batch script's output so far."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def check(self) -> Job:
        """Return self, or raise AssertionError with the end of the output unless it is COMPLETED."""
        if self.state != "COMPLETED":
            raise AssertionError(
                f"job {self.job_id} is {self.state} with exit code {self.exit_code}, but should be COMPLETED; "
                f"the end of {self.output_file}:\n{self.output()[-6000:]}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A running cluster with the nodes node1, node2, ..."""

    root: Path
    """Its configuration, state and daemon logs."""
    num_nodes: int
    """Nodes."""
    ports: tuple[int, ...]
    """Ports of the controller and of each node."""

    @property
    def env(self) -> dict[str, str]:
        """Variables that make SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def command(self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Run one of SLURM's commands and return what it prints; AssertionError when it fails."""
        done = subprocess.run(
            [str(argument) for argument in arguments], env=clean_environment(self.env | dict(env or {})), cwd=cwd,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False,
        )
        if done.returncode:
            raise AssertionError(f"{arguments} failed with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> int:
        """`sbatch ARGUMENTS`; the job gets this process's environment (cleaned) and `env`. Returns its id."""
        return int(self.command("sbatch", "--parsable", *arguments, env=env, cwd=cwd).split(";")[0])

    def job(self, job_id: int) -> Job:
        """The job as the controller sees it now."""
        line = self.command("scontrol", "show", "job", "--oneliner", str(job_id))
        fields = dict(item.split("=", 1) for item in line.split() if "=" in item)
        return Job(
            job_id=job_id, state=fields["JobState"], exit_code=fields["ExitCode"],
            output_file=Path(fields.get("StdOut", os.devnull)),
        )

    def cancel(self, job_id: int, *, signal: str | None = None) -> None:
        """End a job as `scancel` does, or send `signal` (a name, `KILL`) to all of its processes."""
        self.command("scancel", *([] if signal is None else [f"--signal={signal}", "--full"]), str(job_id))

    def wait(self, job_id: int, *, timeout_seconds: float) -> Job:
        """Wait until the job is finished; on time-out cancel it and raise AssertionError with its output."""
        return self.wait_until(job_id, lambda job: job.finished, timeout_seconds=timeout_seconds, what="finish")

    def wait_until(
        self, job_id: int, reached: Callable[[Job], bool], *, timeout_seconds: float, what: str
    ) -> Job:
        """Wait until `reached(job)`, or raise AssertionError when the job finished first or time is up.

        Args:
            job_id: The job.
            reached: Looks at the job, or at what it wrote.
            timeout_seconds: Longest wait; the job is cancelled after it.
            what: The awaited thing, for the message: "job 5 did not <what> ...".
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.job(job_id)
            if reached(job):
                return job
            if job.finished or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not job.finished:
            self.cancel(job_id, signal="KILL")
        raise AssertionError(
            f"job {job_id} did not {what} within {timeout_seconds:.0f} s and is {job.state} ({job.exit_code}); "
            f"the end of {job.output_file}:\n{job.output()[-6000:]}\n{self.command('squeue')}"
        )

    def kill_node(self, number: int) -> None:
        """Node `number` (from 1) dies at once with everything that runs on it."""
        _minislurm(self.root, self.ports, "kill-node", str(number))

    def start_node(self, number: int) -> None:
        """Node `number` comes back."""
        _minislurm(self.root, self.ports, "start-node", str(number))


def why_unavailable() -> str | None:
    """Why no cluster can be started here, or None. Installs SLURM's packages where it may and must."""
    if os.geteuid() != 0:
        return "a test cluster needs root (munged and slurmd switch users); run as root or in a container"
    done = subprocess.run(
        ["bash", str(_HERE / "install_slurm.sh")], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@contextmanager
def slurm_cluster(num_nodes: int = 2, *, cpus_per_node: int = 4, gpus_per_node: int = 0) -> Iterator[SlurmCluster]:
    """Start a cluster, and end it with all its jobs in every case.

    Args:
        num_nodes: Nodes, all on this machine.
        cpus_per_node: CPUs that SLURM believes each node to have.
        gpus_per_node: GPUs that SLURM believes each node to have; nothing can be computed on them.

    Raises:
        RuntimeError: It did not come up, or did not go away; the message holds the end of its logs.
    """
    # Not under pytest's folder: munged wants every parent of its socket to be open to all users, and
    # the path of a socket may have 107 characters at most.
    root = Path(tempfile.mkdtemp(prefix="vlmoe-slurm-", dir="/tmp"))
    cluster = SlurmCluster(root=root, num_nodes=num_nodes, ports=tuple(free_ports(num_nodes + 1)))
    supervisor = subprocess.Popen(
        ["bash", str(_HERE / "minislurm.sh"), "run", str(num_nodes)], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(root / "supervisor.log").open("w"),
        env=_environment(root, cluster.ports, cpus_per_node, gpus_per_node),
    )
    try:
        _wait_until_ready(supervisor, root)
        yield cluster
    finally:
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        status = supervisor.wait(timeout=_STOP_SECONDS)
        logs = _logs(root)
        shutil.rmtree(root, ignore_errors=True)
    if status:
        raise RuntimeError(f"the test cluster did not go away cleanly ({status}); its logs end:\n{logs}")


def _wait_until_ready(supervisor: subprocess.Popen[str], root: Path) -> None:
    assert supervisor.stdout is not None
    # minislurm.sh limits its own waits, so this line comes, or the end of the file.
    if supervisor.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the test cluster did not start; its logs end:\n{_logs(root)}")


def _logs(root: Path) -> str:
    files = [root / "supervisor.log", *sorted(root.glob("log/*.log"))]
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files if file.exists())


def _environment(root: Path, ports: tuple[int, ...], cpus: int, gpus: int) -> dict[str, str]:
    return clean_environment(
        {
            "MINISLURM_ROOT": str(root),
            "MINISLURM_PORTS": " ".join(map(str, ports)),
            "MINISLURM_CPUS": str(cpus),
            "MINISLURM_GPUS": str(gpus),
            # The port at which a job's ranks meet follows from its number; clusters side by side on
            # one machine must not number their jobs alike.
            "MINISLURM_FIRST_JOB": str(random.SystemRandom().randrange(1, 60_000)),
        }
    )


def _minislurm(root: Path, ports: tuple[int, ...], *arguments: str) -> None:
    subprocess.run(
        ["bash", str(_HERE / "minislurm.sh"), *arguments], env=_environment(root, ports, 4, 0),
        stdin=subprocess.DEVNULL, check=True, timeout=_STOP_SECONDS,
    )
