"""A save that fails, or is killed, at each of its file operations."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_support import FakeEngine, World, one_rank

from data_pipeline.common.errors import CheckpointError
from pretrain.checkpoint import find_latest, load_latest, load_model_weights, save

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "close")


class Killed(BaseException):
    """Stands for a kill: nothing catches it, so nothing is tidied up."""


class Trap:
    """Counts the file operations below one folder and springs at the chosen one."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, spring: Callable[[str], None], at: int
    ) -> None:
        self.count, self.sprung, self.log = 0, "", []
        self._spring, self._at = spring, at
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._watch(name, getattr(os, name)))

    def _watch(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            dead = self.sprung and self._spring is kill
            if dead and name != "close":
                raise Killed(name)  # a dead process does nothing more
            if not self.sprung and name != "close":
                self.log.append(name)
                self.count += 1
                if self.count == self._at:
                    self.sprung = name
                    self._spring(name)
            return real(*args, **kwargs)

        return watched


def kill(name: str) -> None:
    raise Killed(name)


def fill_disk(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def break_disk(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def save_step(root: Path, step: int, value: float) -> Path:
    engine = one_rank(value=value)
    return save(engine, root=root, step=step, state_json={"value": value}, rank_state={}, keep=2)


def saved_twice(root: Path) -> Path:
    save_step(root, 10, 1.0)
    save_step(root, 20, 2.0)
    return root


def count_operations(monkeypatch: pytest.MonkeyPatch, root: Path, step: int) -> list[str]:
    with monkeypatch.context() as patch:
        trap = Trap(patch, kill, at=-1)
        save_step(root, step, 3.0)
    return trap.log


def each_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> Iterator[tuple[int, str, Path]]:
    """A fresh folder with steps 10 and 20, for each operation that saving `step` does."""
    names = count_operations(monkeypatch, saved_twice(tmp_path / "count"), step)
    assert len(names) > 10
    assert {"write", "fsync", "rename", "replace"} <= set(names)
    for number, name in enumerate(names, start=1):
        yield number, name, saved_twice(tmp_path / f"{number:03d}")


@pytest.mark.parametrize("step", [30, 20])
def test_a_kill_anywhere_leaves_something_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    seen = set()
    for number, name, root in each_operation(tmp_path, monkeypatch, step):
        with monkeypatch.context() as patch:
            Trap(patch, kill, at=number)
            with pytest.raises(Killed):
                save_step(root, step, 3.0)
        engine = one_rank()
        resumed = load_latest(engine, root)
        assert resumed is not None, f"nothing to go on from after a kill at {number} ({name})"
        # Either the state before this save, or the new one; never a mixture, never an older one.
        assert resumed.state_json["value"] in (2.0, 3.0)
        assert engine.dense[0, 0] == resumed.state_json["value"]
        assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
        seen.add(resumed.state_json["value"])
        save_step(root, step, 4.0)
        assert find_latest(root) == root / f"step-{step:08d}"
    assert seen == {2.0, 3.0}


@pytest.mark.parametrize("spring", [fill_disk, break_disk])
@pytest.mark.parametrize("step", [30, 20])
def test_an_error_anywhere_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, spring: Callable[[str], None]
) -> None:
    failed = 0
    for number, name, root in each_operation(tmp_path, monkeypatch, step):
        try:
            with monkeypatch.context() as patch:
                Trap(patch, spring, at=number)
                save_step(root, step, 3.0)
            kept = 3.0  # the error hit nothing that matters: tidying, or a last fsync
        except CheckpointError as error:
            failed += 1
            kept = 2.0
            assert f"step {step} was not saved" in str(error), name
            assert "previous checkpoint" in str(
                error
            ) and "step-00000020 is untouched and good" in str(error)
            assert "step-00000020" in (root / "latest").read_text()
            left = sorted(path.name for path in root.iterdir())
            assert left == ["latest", "step-00000010", "step-00000020"], (number, name)
        resumed = load_latest(one_rank(), root)
        assert resumed is not None
        assert resumed.state_json["value"] == kept, (number, name)
    assert failed > 8


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10, 1.0)
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if "optimizer" in os.readlink(f"/proc/self/fd/{descriptor}"):
            fill_disk("write")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError) as raised:
        save_step(tmp_path, 20, 2.0)
    message = str(raised.value)
    for part in (
        "step 20",
        "rank 0",
        "optimizer-00000.safetensors",
        "No space left on device",
        "MiB free",
        "lower checkpoint.keep",
        "step-00000010 is untouched and good",
    ):
        assert part in message


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_ranks_trouble_is_every_ranks_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_rank: int
) -> None:
    world_size = World(2)

    def save_on(rank: int) -> Path:
        return save(
            FakeEngine(world_size, rank), root=tmp_path, step=5, state_json={}, rank_state={}
        )

    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if f"optimizer-{bad_rank:05d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            fill_disk("write")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        errors = world_size.run(save_on)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])
    assert f"rank {bad_rank} could not write" in str(errors[0])
    assert "There is no earlier one" in str(errors[0])
    assert list(tmp_path.iterdir()) == []
    assert world_size.run(save_on) == [tmp_path / "step-00000005"] * 2


def test_an_unexpected_error_on_one_rank_does_not_hang_the_other(tmp_path: Path) -> None:
    world_size = World(2)
    states: list[Any] = [{}, {"not json": object()}]
    errors = world_size.run(
        lambda rank: save(
            FakeEngine(world_size, rank),
            root=tmp_path,
            step=5,
            state_json={},
            rank_state=states[rank],
        )
    )
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "not JSON serializable" in str(errors[0])


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
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
