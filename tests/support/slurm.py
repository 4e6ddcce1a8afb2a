"""A SLURM cluster on this machine for tests, as a context manager (see minislurm.sh).

    with slurm_cluster(num_nodes=2) as cluster:
        job = cluster.submit("slurm/pretrain.sbatch", "run.yaml", "runs/a")
        cluster.wait(job, timeout_seconds=60).check()

The cluster stops at the end of the `with` block, and also if this process is killed: its supervisor
waits for the end of a pipe whose write end only this process has open.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import ROOT, clean_environment
from tests.support.ports import free_ports
from tests.support.processes import process_environments

_HERE = Path(__file__).resolve().parent
_FINISHED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED".split()
    + "NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)
_STOP_SECONDS, _COMMAND_SECONDS = 30.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """State of a job, from the controller."""

    job_id: int
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
    exit_code: str
    """Exit status and signal, `0:0` for success."""
    output_file: Path
    """Output file of the batch script."""

    @property
    def finished(self) -> bool:
        """Whether the job has ended and will not run again."""
        return self.state in _FINISHED

    def output(self) -> str:
        """The batch script's output so far."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def check(self, logs: Path | None = None) -> Job:
        """Return self if the job is COMPLETED, else raise AssertionError; `logs` as in `wait`."""
        if self.state != "COMPLETED":
            raise AssertionError(f"{self.described(logs)}\n(expected COMPLETED)")
        return self

    def described(self, logs: Path | None = None) -> str:
        """State of the job, and the ends of its output and of its files in the folder `logs`."""
        files = [self.output_file, *(sorted(logs.glob(f"*{self.job_id}*")) if logs else [])]
        return f"job {self.job_id} is {self.state} ({self.exit_code})\n{_tails(files)}"


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A running cluster with the nodes node1, node2, ..."""

    root: Path
    """Folder of its configuration, state and daemon logs."""
    num_nodes: int
    ports: tuple[int, ...]
    """Ports of the controller and of each node."""

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for SLURM's commands."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def command(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> str:
        """Run one of SLURM's commands and return its output; AssertionError if it fails."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env=clean_environment(self.env | dict(env or {})),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            raise AssertionError(
                f"{arguments} failed with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout

    def submit(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> int:
        """`sbatch ARGUMENTS` with `clean_environment()` and `env`; returns the job id."""
        return int(self.command("sbatch", "--parsable", *arguments, env=env, cwd=cwd).split(";")[0])

    def job(self, job_id: int) -> Job:
        """Current state of the job."""
        line = self.command("scontrol", "show", "job", "--oneliner", str(job_id))
        fields = dict(item.split("=", 1) for item in line.split() if "=" in item)
        return Job(
            job_id=job_id,
            state=fields["JobState"],
            exit_code=fields["ExitCode"],
            output_file=Path(fields.get("StdOut", os.devnull)),
        )

    def cancel(self, job_id: int) -> None:
        """Cancel a job with `scancel`: SIGTERM to its tasks, and SIGKILL ten seconds later."""
        self.command("scancel", str(job_id))

    def kill_rank(self, job_id: int, rank: int) -> None:
        """Send SIGKILL to all processes of one rank of a job: the trainer and its workers."""
        tags = {f"SLURM_JOB_ID={job_id}", f"SLURM_CONF={self.env['SLURM_CONF']}", f"RANK={rank}"}
        processes = [process for process, variables in process_environments() if tags <= variables]
        if not processes:
            raise AssertionError(
                f"no process of job {job_id} has RANK={rank}; {self.job(job_id).described()}"
            )
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait(self, job_id: int, *, timeout_seconds: float, logs: Path | None = None) -> Job:
        """Wait until the job is finished; see `wait_until`."""
        return self.wait_until(
            job_id,
            lambda job: job.finished,
            what="finish",
            timeout_seconds=timeout_seconds,
            logs=logs,
        )

    def wait_until(
        self,
        job_id: int,
        reached: Callable[[Job], bool],
        *,
        what: str,
        timeout_seconds: float,
        logs: Path | None = None,
    ) -> Job:
        """Wait until `reached(job)`.

        Args:
            job_id: The job.
            reached: Predicate on the job.
            what: What `reached` tests, for the message "job 5 did not <what>".
            timeout_seconds: The job is canceled after this time.
            logs: Folder with more output files of the job (named by its id), for the message.

        Raises:
            AssertionError: The job ended or the time is up; the message contains its output.
        """
        deadline = time.monotonic() + timeout_seconds
        while not reached(job := self.job(job_id)):
            if job.finished:
                raise AssertionError(
                    f"job {job_id} finished but did not {what}: {job.described(logs)}"
                )
            if time.monotonic() > deadline:
                message = (
                    f"job {job_id} did not {what} in {timeout_seconds:.0f} s: {job.described(logs)}"
                )
                self.cancel(job_id)
                raise AssertionError(message)
            time.sleep(0.1)
        return job

    def kill_node(self, node: int) -> None:
        """Kill all processes of a node (numbered from 1)."""
        _minislurm(self.root, self.ports, "kill-node", str(node))

    def start_node(self, node: int) -> None:
        """Start a node again (numbered from 1)."""
        _minislurm(self.root, self.ports, "start-node", str(node))


def why_unavailable() -> str | None:
    """Why no cluster can be started, or None if it can; installs SLURM's packages if necessary."""
    if os.geteuid() != 0:
        return "a test cluster requires root (munged and slurmd switch users); run as root"
    done = subprocess.run(
        ["bash", str(_HERE / "install_slurm.sh")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@contextmanager
def slurm_cluster(
    num_nodes: int = 2, *, cpus_per_node: int = 4, gpus_per_node: int = 0
) -> Iterator[SlurmCluster]:
    """Run a cluster; all its jobs and daemons are stopped at the end.

    Args:
        num_nodes: Number of nodes, all on this machine.
        cpus_per_node: CPUs per node in SLURM's configuration.
        gpus_per_node: GPUs per node in SLURM's configuration; their device files are fake.

    Raises:
        RuntimeError: It did not start or stop; the message contains the ends of its logs.
    """
    # Not in pytest's folder: munged requires every parent of its socket to be accessible to all
    # users, and a socket's path is limited to 107 characters.
    root = Path(tempfile.mkdtemp(prefix="vlmoe-slurm-", dir="/tmp"))
    cluster = SlurmCluster(root=root, num_nodes=num_nodes, ports=tuple(free_ports(num_nodes + 1)))
    supervisor = subprocess.Popen(
        ["bash", str(_HERE / "minislurm.sh"), "run", str(num_nodes)],
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(root / "supervisor.log").open("w"),
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
        raise RuntimeError(
            f"the test cluster did not stop cleanly ({status}); end of its logs:\n{logs}"
        )


def _wait_until_ready(supervisor: subprocess.Popen[str], root: Path) -> None:
    assert supervisor.stdout is not None
    # minislurm.sh has timeouts, so it prints this line or exits.
    if supervisor.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the test cluster did not start; end of its logs:\n{_logs(root)}")


def _logs(root: Path) -> str:
    return _tails([root / "supervisor.log", *sorted(root.glob("log/*.log"))])


def _tails(files: list[Path]) -> str:
    """The ends of the files that exist."""
    return "\n".join(
        f"--- the end of {file}\n{file.read_text(errors='replace')[-4000:]}"
        for file in files
        if file.is_file()
    )


def _environment(root: Path, ports: tuple[int, ...], cpus: int, gpus: int) -> dict[str, str]:
    rng = random.SystemRandom()
    return clean_environment(
        {
            "MINISLURM_ROOT": str(root),
            "MINISLURM_PORTS": " ".join(map(str, ports)),
            "MINISLURM_CPUS": str(cpus),
            "MINISLURM_GPUS": str(gpus),
            # A job's master port is derived from its id, so clusters that run at the same time must
            # use different ids. The ports are 26000 and up, which no other test server uses.
            "MINISLURM_FIRST_JOB": str(10_000 * rng.randrange(6) + rng.randrange(6_000, 9_900)),
        }
    )


def _minislurm(root: Path, ports: tuple[int, ...], *arguments: str) -> None:
    subprocess.run(
        ["bash", str(_HERE / "minislurm.sh"), *arguments],
        env=_environment(root, ports, 4, 0),
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=_STOP_SECONDS,
    )
