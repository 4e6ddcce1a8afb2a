"""Checkpoint files: format, round trip, retention."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import find_latest, load_latest, load_model_weights, read_meta, save
from pretrain.checkpoint.files import write_tensors
from tests.unit.pretrain.checkpoint_support import FakeEngine, FakeWorld, one_rank

STATE: dict[str, Any] = {"loader": {"position": 2**60 + 1}, "name": "é", "lr": 0.1}


def save_step(root: Path, step: int, *, value: float = 0.0, keep: int = 9, **layout: Any) -> Path:
    engine = one_rank(value=value, **layout)
    return save(engine, root=root, step=step, state_json=STATE, keep=keep)


def test_written_tensors_can_be_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.tensor(True),
        "d": torch.randn(6, 4).t(),
        "e": torch.zeros(0, 7),
        "f": torch.randint(0, 99, (3,), dtype=torch.uint8),
        "g": torch.tensor(3, dtype=torch.int64),
    }
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert record == (len(data), hashlib.sha256(data).hexdigest())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_file_equals_that_of_safetensors_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3, 5), "bias": torch.randn(4).bfloat16()}
    write_tensors(tmp_path / "actual", tensors)
    save_file(tensors, tmp_path / "expected")
    actual, expected = ((tmp_path / name).read_bytes() for name in ("actual", "expected"))
    header_ends = [8 + int.from_bytes(data[:8], "little") for data in (actual, expected)]
    assert json.loads(actual[8 : header_ends[0]]) == json.loads(expected[8 : header_ends[1]])
    assert actual[header_ends[0] :] == expected[header_ends[1] :]


def test_round_trip_on_two_ranks(tmp_path: Path) -> None:
    world = FakeWorld(2)
    before = [FakeEngine(world, rank, value=0.5) for rank in range(2)]
    paths = world.run(
        lambda rank: save(
            before[rank],
            root=tmp_path,
            step=100,
            state_json=STATE,
        )
    )
    assert paths == [tmp_path / "step-00000100"] * 2
    assert sorted(path.name for path in paths[0].iterdir()) == [
        "meta.json",
        "state-00000.safetensors",
        "state-00001.safetensors",
    ]
    after = [FakeEngine(world, rank, value=-3.0) for rank in range(2)]
    resumed = world.run(lambda rank: load_latest(after[rank], tmp_path))
    for rank in range(2):
        assert resumed[rank].path == paths[0]
        assert resumed[rank].state_json == STATE
        assert resumed[rank].layout == before[rank].layout.to_json()
        assert torch.equal(after[rank].dense, before[rank].dense)
        assert torch.equal(after[rank].experts, before[rank].experts)
        for name, tensor in before[rank].moments.items():
            assert torch.equal(after[rank].moments[name], tensor)


def test_experts_of_all_ranks_are_concatenated(tmp_path: Path) -> None:
    world = FakeWorld(2)
    path = world.run(
        lambda rank: save(FakeEngine(world, rank), root=tmp_path, step=1, state_json={})
    )[0]
    weights = load_model_weights(path)
    assert weights.keys() == {"dense", "block.experts.w1"}
    assert weights["block.experts.w1"][:, 0].tolist() == [0.0, 0.0, 10.0, 10.0]


def test_no_checkpoints_yet(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "checkpoints") is None
    assert load_latest(one_rank(), tmp_path / "checkpoints") is None


def test_retention_keeps_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000004",
    ]
    # After a rollback to step 2, the checkpoint just written is kept although 3 and 4 are newer.
    save_step(tmp_path, 2, keep=1)
    assert find_latest(tmp_path) == tmp_path / "step-00000002"


def test_saving_the_same_step_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 5, value=1.0)
    save_step(tmp_path, 5, value=2.0)
    assert load_model_weights(tmp_path / "step-00000005")["dense"][0, 0] == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    (tmp_path / ".writing-step-00000009").mkdir()
    (tmp_path / ".writing-step-00000009" / "state-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005").rename(tmp_path / ".replaced-step-00000005")
    resumed = load_latest(one_rank(), tmp_path)
    assert resumed is not None
    assert resumed.path == tmp_path / "step-00000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_contents_of_meta(tmp_path: Path) -> None:
    meta = read_meta(save_step(tmp_path, 7))
    assert (meta.step, meta.state) == (7, STATE)
    assert meta.layout == one_rank().layout.to_json()
    for name, record in meta.files.items():
        data = (tmp_path / "step-00000007" / name).read_bytes()
        assert record == (len(data), hashlib.sha256(data).hexdigest())
