"""Corrupt checkpoints, and checkpoints of another layout or format version."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

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
    return save(engine, root=root, step=step, state_json=STATE, rank_state={"torch": "ab12"})


def test_missing_experts(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1, num_experts=4)
    with pytest.raises(CorruptCheckpointError, match=r"expected 4 experts.*\(0, 2\)"):
        load_model_weights(path)


@pytest.mark.parametrize(
    ("field", "layout", "advice"),
    [
        (
            "expert_parallel_size 2",
            {"expert_parallel_size": 2},
            "set parallel.expert_parallel_size=2",
        ),
        ("zero_stage 3", {"zero_stage": 3}, "profile with ZeRO stage 3"),
        ("zero_stage -1", {"zero_stage": -1}, "set parallel.engine=plain"),
        ("precision bf16", {"precision": "bf16"}, "set precision.compute=bf16"),
    ],
)
def test_other_layout_is_an_error(
    tmp_path: Path, field: str, layout: dict[str, Any], advice: str
) -> None:
    save_step(tmp_path, 1, **layout)
    engine = one_rank(value=9.0)
    with pytest.raises(CheckpointError) as raised:
        load_latest(engine, tmp_path)
    assert type(raised.value) is CheckpointError  # no older checkpoint is tried
    assert field in str(raised.value)
    assert advice in str(raised.value)
    assert engine.loaded_names == []


def test_other_world_size_is_an_error_on_every_rank(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    world = FakeWorld(2)
    errors = world.run(lambda rank: load(FakeEngine(world, rank, expert_parallel_size=1), path))
    assert str(errors[0]) == str(errors[1])
    assert "world_size 1 (now 2)" in str(errors[0])
    assert "start the run with a world size of 1" in str(errors[0])


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
    "no optimizer": lambda path: (path / "optimizer-00000.safetensors").unlink(),
    "truncated weights": lambda path: (path / "model-00000.safetensors").write_bytes(b"x"),
    "one bit of the weights": lambda path: flip_last_bit(path / "model-00000.safetensors"),
    "one bit of the optimizer": lambda path: flip_last_bit(path / "optimizer-00000.safetensors"),
    "one bit of the random state": lambda path: flip_last_bit(path / "rank-00000.json"),
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
        return save(FakeEngine(world, rank), root=tmp_path, step=1, state_json={}, rank_state={})

    path = world.run(save_on)[0]
    flip_last_bit(path / "optimizer-00001.safetensors")
    engines = [FakeEngine(world, rank) for rank in range(2)]
    errors = world.run(lambda rank: load(engines[rank], path))
    assert [type(error) for error in errors] == [CorruptCheckpointError] * 2
    assert "optimizer-00001.safetensors has SHA-256" in str(errors[0])
    assert [engine.loaded_names for engine in engines] == [[], []]


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
    with pytest.raises(CheckpointError, match=r"format version 1.* version 3"):
        read_meta(path)
