"""Saving fails, or the process is killed, at each of its file operations."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointError, find_latest, load_latest, load_model_weights, save
from pretrain.checkpoint.writer import CheckpointWriter
from tests.unit.pretrain.checkpoint_support import FakeEngine, FakeWorld, one_rank

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "close")


class Killed(BaseException):
    """Simulates SIGKILL: the code under test does not catch it, so nothing is cleaned up."""


class FaultInjector:
    """Records the file operations of `os` and injects a fault at one of them.

    Args:
        monkeypatch: Patches `os`.
        fault: Called with the name of the operation; raises.
        at: Index of the operation, from 1.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[str], None], at: int
    ) -> None:
        self.triggered = False
        self.operations: list[str] = []
        self._fault, self._at = fault, at
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if name == "close":
                return real(*args, **kwargs)
            if self.triggered and self._fault is kill:
                raise Killed(name)  # a killed process performs no further operation
            if not self.triggered:
                self.operations.append(name)
                if len(self.operations) == self._at:
                    self.triggered = True
                    self._fault(name)
            return real(*args, **kwargs)

        return wrapped


def kill(name: str) -> None:
    raise Killed(name)


def disk_full(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def save_step(root: Path, step: int, value: float, *, in_background: bool = False) -> Path:
    writer = CheckpointWriter(one_rank(value=value), root, keep=2)
    writer.start(step, {"value": value}, in_background=in_background)
    return writer.finish()


def saved_twice(root: Path) -> Path:
    save_step(root, 10, 1.0)
    save_step(root, 20, 2.0)
    return root


def list_operations(monkeypatch: pytest.MonkeyPatch, root: Path, step: int) -> list[str]:
    with monkeypatch.context() as patch:
        injector = FaultInjector(patch, kill, at=-1)
        save_step(root, step, 3.0)
    return injector.operations


def each_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> Iterator[tuple[int, str, Path]]:
    """(index, name, new folder with steps 10 and 20) for each operation of saving `step`."""
    names = list_operations(monkeypatch, saved_twice(tmp_path / "count"), step)
    assert len(names) > 10
    assert {"write", "fsync", "rename", "replace"} <= set(names)
    for index, name in enumerate(names, start=1):
        yield index, name, saved_twice(tmp_path / f"{index:03d}")


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("step", [30, 20])
def test_run_can_resume_after_a_kill_at_any_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, in_background: bool
) -> None:
    resumed_values = set()
    for index, name, root in each_operation(tmp_path, monkeypatch, step):
        with monkeypatch.context() as patch:
            FaultInjector(patch, kill, at=index)
            with pytest.raises(Killed):
                save_step(root, step, 3.0, in_background=in_background)
        engine = one_rank()
        resumed = load_latest(engine, root)
        assert resumed is not None, f"cannot resume after a kill at operation {index} ({name})"
        # Either the previous checkpoint or the new one, never a mixture or an older one.
        assert resumed.state_json["value"] in (2.0, 3.0)
        assert engine.dense[0, 0] == resumed.state_json["value"]
        assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
        resumed_values.add(resumed.state_json["value"])
        save_step(root, step, 4.0)
        assert find_latest(root) == root / f"step-{step:08d}"
    assert resumed_values == {2.0, 3.0}


@pytest.mark.parametrize("fault", [disk_full, io_error])
@pytest.mark.parametrize("step", [30, 20])
def test_previous_checkpoint_is_intact_after_an_error_at_any_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, fault: Callable[[str], None]
) -> None:
    failed = 0
    for index, name, root in each_operation(tmp_path, monkeypatch, step):
        try:
            with monkeypatch.context() as patch:
                FaultInjector(patch, fault, at=index)
                save_step(root, step, 3.0)
            kept = 3.0  # the error only affected cleanup or the last fsync
        except CheckpointError as error:
            failed += 1
            kept = 2.0
            assert f"step {step} was not saved" in str(error), name
            assert "step-00000020 is intact" in str(error)
            assert "step-00000020" in (root / "latest").read_text()
            names = sorted(path.name for path in root.iterdir())
            assert names == ["latest", "step-00000010", "step-00000020"], (index, name)
        resumed = load_latest(one_rank(), root)
        assert resumed is not None
        assert resumed.state_json["value"] == kept, (index, name)
    assert failed > 8


def test_error_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10, 1.0)
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if "state-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            disk_full("write")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError) as raised:
        save_step(tmp_path, 20, 2.0)
    message = str(raised.value)
    for part in (
        "step 20",
        "rank 0",
        "state-00000.safetensors",
        "No space left on device",
        "MiB free",
        "lower checkpoint.keep",
        "step-00000010 is intact",
    ):
        assert part in message


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_error_on_one_rank_is_raised_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rank: int
) -> None:
    world = FakeWorld(2)

    def save_on(rank: int) -> Path:
        return save(FakeEngine(world, rank), root=tmp_path, step=5, state_json={})

    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if f"state-{failing_rank:05d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            disk_full("write")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        errors = world.run(save_on)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])
    assert f"rank {failing_rank} could not write" in str(errors[0])
    assert "There is no earlier checkpoint" in str(errors[0])
    assert list(tmp_path.iterdir()) == []
    assert world.run(save_on) == [tmp_path / "step-00000005"] * 2


def test_unexpected_error_on_one_rank_does_not_hang_the_other(tmp_path: Path) -> None:
    world = FakeWorld(2)
    engines = [FakeEngine(world, rank) for rank in range(2)]
    engines[1].error = RuntimeError("not expected")
    errors = world.run(lambda rank: save(engines[rank], root=tmp_path, step=5, state_json={}))
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "rank 1 could not write" in str(errors[0]) and "not expected" in str(errors[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 64 KiB file system."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {result.stderr.strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_real_full_disk(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save_step(root, 10, 1.0)
    with (
        (small_disk / "filler").open("wb", buffering=0) as filler,
        pytest.raises(OSError, match="No space"),
    ):
        while True:
            filler.write(bytes(4096))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_step(root, 20, 2.0)
    assert find_latest(root) == root / "step-00000010"
    (small_disk / "filler").unlink()
    save_step(root, 20, 2.0)
    assert load_model_weights(root / "step-00000020")["dense"][0, 0] == 2.0
