"""Corrupt checkpoints, and checkpoints of another layout, model or format version."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import (
    CheckpointError,
    CorruptCheckpointError,
    find_latest,
    load,
    load_latest,
    load_model_weights,
    read_meta,
    save,
)
from tests.unit.pretrain.checkpoint_support import FakeEngine, FakeWorld, flip_last_bit, one_rank

STATE: dict[str, Any] = {"position": 2**60 + 1}


def save_step(root: Path, step: int, *, value: float = 0.0, **layout: Any) -> Path:
    engine = one_rank(value=value, **layout)
    return save(engine, root=root, step=step, state_json=STATE)


def test_missing_experts(tmp_path: Path) -> None:
    """A checkpoint without some values is not published, and does not replace others."""
    path = save_step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"every value of 'block\.experts\.w1' once"):
        save_step(tmp_path, 2, num_experts=4)
    assert find_latest(tmp_path) == path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", path.name]


def test_incomplete_state_of_an_engine(tmp_path: Path) -> None:
    """Such as partitions that DeepSpeed has moved elsewhere."""
    engine = one_rank()
    del engine.moments["exp_avg"]
    with pytest.raises(CheckpointError, match=r"incomplete state of 'block\.experts\.w1'"):
        save(engine, root=tmp_path, step=1, state_json={})
    engine = one_rank()
    engine.moments["exp_avg"] = torch.zeros(0)
    with pytest.raises(CheckpointError, match=r"'exp_avg': 0"):
        save(engine, root=tmp_path, step=1, state_json={})


@pytest.mark.parametrize(
    "layout", [{"zero_stage": 3}, {"zero_stage": -1}, {"precision": "bf16"}, {"num_experts": 2}]
)
def test_layout_may_differ(tmp_path: Path, layout: dict[str, Any]) -> None:
    save_step(tmp_path, 1, value=3.0, **layout)
    engine = one_rank(value=9.0)
    resumed = load_latest(engine, tmp_path)
    assert resumed is not None and resumed.layout != one_rank(precision="other").layout.to_json()
    assert engine.dense[0, 0] == engine.experts[0, 0] == 3.0


def test_other_world_size(tmp_path: Path) -> None:
    """Two ranks load what one has written, and one what two have written."""
    world = FakeWorld(2)
    engines = [FakeEngine(world, rank, value=0.5) for rank in range(2)]
    path = world.run(lambda rank: save(engines[rank], root=tmp_path, step=1, state_json=STATE))[0]
    single = one_rank(value=9.0, num_experts=4)
    load(single, path)
    assert single.dense[0, 0] == single.experts[0, 0] == 0.5
    weights = load_model_weights(path)
    assert weights["block.experts.w1"][:, 0].tolist() == [0.5, 0.5, 10.5, 10.5]


@pytest.mark.parametrize("file", [0, 1])
def test_fewer_ranks_verify_all_files(tmp_path: Path, file: int) -> None:
    world = FakeWorld(2)
    engines = [FakeEngine(world, rank) for rank in range(2)]
    path = world.run(lambda rank: save(engines[rank], root=tmp_path, step=1, state_json=STATE))[0]
    flip_last_bit(path / f"state-{file:05d}.safetensors")
    single = one_rank(num_experts=4)
    with pytest.raises(CorruptCheckpointError, match=f"state-{file:05d}"):
        load(single, path)
    assert not single.is_loaded


def test_an_unreachable_server_does_not_lead_to_an_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)

    def unreachable(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("pretrain.checkpoint.reader.check_hashes", unreachable)
    with pytest.raises(CheckpointError, match="Stale file handle") as raised:
        load_latest(one_rank(), tmp_path)
    assert type(raised.value) is CheckpointError


def test_checkpoint_of_another_model_is_an_error_on_every_rank(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)  # two experts
    world = FakeWorld(2)
    engines = [FakeEngine(world, rank) for rank in range(2)]
    errors = world.run(lambda rank: load(engines[rank], path))
    assert [type(error) for error in errors] == [CheckpointError] * 2  # no older one is tried
    assert str(errors[0]) == str(errors[1])
    assert "has shape [2, 3] in the checkpoint, and [4, 3] in this run's model" in str(errors[0])
    assert not any(engine.is_loaded for engine in engines)


def modify_meta(path: Path) -> None:
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace(str(2**60 + 1), str(2**60 + 2)))


def truncate_meta(path: Path) -> None:
    (path / "meta.json").write_bytes((path / "meta.json").read_bytes()[:99])


CORRUPTIONS: dict[str, Any] = {
    "no folder": lambda path: path.rename(path.with_name("elsewhere")),
    "no meta": lambda path: (path / "meta.json").unlink(),
    "truncated meta": truncate_meta,
    "modified meta": modify_meta,
    "no state": lambda path: (path / "state-00000.safetensors").unlink(),
    "truncated state": lambda path: (path / "state-00000.safetensors").write_bytes(b"x"),
    "one bit of the state": lambda path: flip_last_bit(path / "state-00000.safetensors"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_fallback_to_an_older_checkpoint_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, corruption: str
) -> None:
    save_step(tmp_path, 1, value=1.0)
    CORRUPTIONS[corruption](save_step(tmp_path, 2, value=2.0))
    engine = one_rank()
    with caplog.at_level(logging.ERROR):
        resumed = load_latest(engine, tmp_path)
    assert resumed is not None
    assert resumed.path.name == "step-00000001"
    assert engine.dense[0, 0] == 1.0
    assert "step-00000002" in caplog.text


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_error_if_all_checkpoints_are_corrupt(tmp_path: Path, corruption: str) -> None:
    path = save_step(tmp_path, 2)
    CORRUPTIONS[corruption](path)
    message = f"no checkpoint in {re.escape(str(tmp_path))} is intact"
    with pytest.raises(CheckpointError, match=message):
        load_latest(one_rank(), tmp_path)


def test_corruption_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    world = FakeWorld(2)

    def save_on(rank: int) -> Path:
        return save(FakeEngine(world, rank), root=tmp_path, step=1, state_json={})

    path = world.run(save_on)[0]
    flip_last_bit(path / "state-00001.safetensors")
    engines = [FakeEngine(world, rank) for rank in range(2)]
    errors = world.run(lambda rank: load(engines[rank], path))
    assert [type(error) for error in errors] == [CorruptCheckpointError] * 2
    assert "state-00001.safetensors has SHA-256" in str(errors[0])
    assert not any(engine.is_loaded for engine in engines)


def test_invalid_latest_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_step(tmp_path, 3)
    (tmp_path / "latest").write_text("../../etc\n")
    with caplog.at_level(logging.ERROR):
        assert find_latest(tmp_path) == tmp_path / "step-00000003"
    assert "'../../etc'" in caplog.text and "not the name of a checkpoint" in caplog.text


def test_unknown_format_version(tmp_path: Path) -> None:
    path = save_step(tmp_path, 3)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    with pytest.raises(CheckpointError, match=r"format version 1.* version 4"):
        read_meta(path)
