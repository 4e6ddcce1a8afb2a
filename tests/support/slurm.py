"""A real SLURM cluster on this machine, as a context manager (see minislurm.sh beside this file).

    with slurm_cluster(num_nodes=2) as cluster:
        job = cluster.submit("slurm/pretrain.sbatch", "run.yaml", "runs/a")
        cluster.wait(job, timeout_seconds=60).check()

The cluster ends with the `with` block, and also when this process is killed: its supervisor waits
for the end of a pipe that only this process holds.
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
from tests.support.processes import environments

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

    def check(self, logs: Path | None = None) -> Job:
        """Return self, or raise AssertionError with the output unless it is COMPLETED; `logs` as in
        `wait`."""
        if self.state != "COMPLETED":
            raise AssertionError(f"{self.described(logs)}\n(it should be COMPLETED)")
        return self

    def described(self, logs: Path | None = None) -> str:
        """Its state and the ends of its output and of its files in the folder `logs`."""
        files = [self.output_file, *(sorted(logs.glob(f"*{self.job_id}*")) if logs else [])]
        return f"job {self.job_id} is {self.state} ({self.exit_code})\n{_ends(files)}"


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

    def command(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> str:
        """Run one of SLURM's commands and return what it prints; AssertionError when it fails."""
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
        """`sbatch ARGUMENTS`; the job gets this process's environment (cleaned) and `env`. Returns
        its id."""
        return int(self.command("sbatch", "--parsable", *arguments, env=env, cwd=cwd).split(";")[0])

    def job(self, job_id: int) -> Job:
        """The job as the controller sees it now."""
        line = self.command("scontrol", "show", "job", "--oneliner", str(job_id))
        fields = dict(item.split("=", 1) for item in line.split() if "=" in item)
        return Job(
            job_id=job_id,
            state=fields["JobState"],
            exit_code=fields["ExitCode"],
            output_file=Path(fields.get("StdOut", os.devnull)),
        )

    def cancel(self, job_id: int) -> None:
        """End a job as `scancel` does: SIGTERM to its tasks, and SIGKILL ten seconds later."""
        self.command("scancel", str(job_id))

    def kill_rank(self, job_id: int, rank: int) -> None:
        """Kill the processes of one rank of a job (the trainer and its workers) without warning."""
        marks = {f"SLURM_JOB_ID={job_id}", f"SLURM_CONF={self.env['SLURM_CONF']}", f"RANK={rank}"}
        victims = [process for process, variables in environments() if marks <= variables]
        if not victims:
            raise AssertionError(
                f"no process of job {job_id} has RANK={rank}; {self.job(job_id).described()}"
            )
        for process in victims:
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
            reached: Looks at the job, or at what it wrote.
            what: The awaited thing, for the message: "job 5 did not <what>".
            timeout_seconds: Longest wait; the job is canceled after it.
            logs: Folder with more files of the job (their names hold its number) for the message.

        Raises:
            AssertionError: The job finished first or time is up; the message ends with its output.
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

    def kill_node(self, number: int) -> None:
        """Node `number` (from 1) dies at once with everything that runs on it."""
        _minislurm(self.root, self.ports, "kill-node", str(number))

    def start_node(self, number: int) -> None:
        """Node `number` comes back."""
        _minislurm(self.root, self.ports, "start-node", str(number))


def why_unavailable() -> str | None:
    """Why no cluster can be started here, or None. Installs SLURM's packages where it may and
    must."""
    if os.geteuid() != 0:
        return "a test cluster needs root (munged and slurmd switch users); run as root or in a container"
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
    """Start a cluster, and end it with all its jobs in every case.

    Args:
        num_nodes: Nodes, all on this machine.
        cpus_per_node: CPUs that SLURM believes each node to have.
        gpus_per_node: GPUs that SLURM believes each node to have; nothing can be computed on them.

    Raises:
        RuntimeError: It did not come up, or did not go away; the message holds the end of its logs.
    """
    # Not under pytest's folder: munged wants every parent of its socket to be open to all users,
    # and the path of a socket may have 107 characters at most.
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
            f"the test cluster did not go away cleanly ({status}); its logs end:\n{logs}"
        )


def _wait_until_ready(supervisor: subprocess.Popen[str], root: Path) -> None:
    assert supervisor.stdout is not None
    # minislurm.sh limits its own waits, so this line comes, or the end of the file.
    if supervisor.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the test cluster did not start; its logs end:\n{_logs(root)}")


def _logs(root: Path) -> str:
    return _ends([root / "supervisor.log", *sorted(root.glob("log/*.log"))])


def _ends(files: list[Path]) -> str:
    """The last lines of the files that exist."""
    return "\n".join(
        f"--- the end of {file}\n{file.read_text(errors='replace')[-4000:]}"
        for file in files
        if file.is_file()
    )


def _environment(root: Path, ports: tuple[int, ...], cpus: int, gpus: int) -> dict[str, str]:
    draw = random.SystemRandom()
    return clean_environment(
        {
            "MINISLURM_ROOT": str(root),
            "MINISLURM_PORTS": " ".join(map(str, ports)),
            "MINISLURM_CPUS": str(cpus),
            "MINISLURM_GPUS": str(gpus),
            # The port at which a job's ranks meet follows from its number; clusters side by side on
            # one machine must not number their jobs alike. From 26000 on, where no other server of
            # a test is.
            "MINISLURM_FIRST_JOB": str(10_000 * draw.randrange(6) + draw.randrange(6_000, 9_900)),
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
