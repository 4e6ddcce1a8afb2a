"""Format, round trip, damage and layout of checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import FakeEngine, World, one_rank
from safetensors.torch import load_file, save_file

from data_pipeline.common.errors import CheckpointError
from pretrain.checkpoint import (
    DamagedCheckpointError,
    find_latest,
    load,
    load_latest,
    load_model_weights,
    read_meta,
    save,
)
from pretrain.checkpoint.format import write_tensors

STATE: dict[str, Any] = {"loader": {"position": 2**60 + 1}, "name": "é", "lr": 0.1}


def save_step(root: Path, step: int, *, value: float = 0.0, keep: int = 9, **layout: Any) -> Path:
    engine = one_rank(value=value, **layout)
    return save(
        engine, root=root, step=step, state_json=STATE, rank_state={"torch": "ab12"}, keep=keep
    )


def test_written_tensors_are_what_the_library_reads(tmp_path: Path) -> None:
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
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_our_file_equals_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3, 5), "bias": torch.randn(4).bfloat16()}
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    split = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert json.loads(ours[8 : split[0]]) == json.loads(theirs[8 : split[1]])
    assert ours[split[0] :] == theirs[split[1] :]


def test_round_trip_on_two_ranks(tmp_path: Path) -> None:
    world_size = World(2)
    before = [FakeEngine(world_size, rank, value=0.5) for rank in range(2)]
    paths = world_size.run(
        lambda rank: save(
            before[rank],
            root=tmp_path,
            step=100,
            state_json=STATE,
            rank_state={"rank": rank, "numpy": "ff"},
        )
    )
    assert paths == [tmp_path / "step-00000100"] * 2
    assert sorted(path.name for path in paths[0].iterdir()) == [
        "meta.json",
        "model-00000.safetensors",
        "model-00001.safetensors",
        "optimizer-00000.safetensors",
        "optimizer-00001.safetensors",
        "rank-00000.json",
        "rank-00001.json",
    ]
    after = [FakeEngine(world_size, rank, value=-3.0) for rank in range(2)]
    resumed = world_size.run(lambda rank: load_latest(after[rank], tmp_path))
    for rank in range(2):
        assert resumed[rank].path == paths[0]
        assert resumed[rank].state_json == STATE
        assert resumed[rank].rank_state == {"rank": rank, "numpy": "ff"}
        assert torch.equal(after[rank].dense, before[rank].dense)
        assert torch.equal(after[rank].experts, before[rank].experts)
        for name, tensor in before[rank].moments.items():
            assert torch.equal(after[rank].moments[name], tensor)


def test_experts_of_all_ranks_become_one_tensor(tmp_path: Path) -> None:
    world_size = World(2)
    path = world_size.run(
        lambda rank: save(
            FakeEngine(world_size, rank), root=tmp_path, step=1, state_json={}, rank_state={}
        )
    )[0]
    weights = load_model_weights(path)
    assert weights.keys() == {"dense", "block.experts.w1"}
    assert weights["block.experts.w1"][:, 0].tolist() == [0.0, 0.0, 10.0, 10.0]


def test_missing_experts_are_noticed(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1, num_experts=4)
    with pytest.raises(DamagedCheckpointError, match="4 were trained, found slices"):
        load_model_weights(path)


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "checkpoints") is None
    assert load_latest(one_rank(), tmp_path / "checkpoints") is None


def test_old_checkpoints_go_but_never_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000004",
    ]
    # A step back to 2 while 3 and 4 lie there: the one just written stays whatever its number.
    save_step(tmp_path, 2, keep=1)
    assert find_latest(tmp_path) == tmp_path / "step-00000002"


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_step(tmp_path, 5, value=1.0)
    save_step(tmp_path, 5, value=2.0)
    assert load_model_weights(tmp_path / "step-00000005")["dense"][0, 0] == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    (tmp_path / ".writing-step-00000009").mkdir()
    (tmp_path / ".writing-step-00000009" / "model-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005").rename(tmp_path / ".replaced-step-00000005")
    resumed = load_latest(one_rank(), tmp_path)
    assert resumed is not None
    assert resumed.path == tmp_path / "step-00000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


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
def test_another_layout_is_refused(
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


def test_another_world_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    world_size = World(2)
    errors = world_size.run(
        lambda rank: load(FakeEngine(world_size, rank, expert_parallel_size=1), path)
    )
    assert str(errors[0]) == str(errors[1])
    assert "world_size 1 (now 2)" in str(errors[0])
    assert "start the run with 1 ranks" in str(errors[0])


def damage_meta(path: Path) -> None:
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace(str(2**60 + 1), str(2**60 + 2)))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Any] = {
    "no folder": lambda path: path.rename(path.with_name("elsewhere")),
    "no meta": lambda path: (path / "meta.json").unlink(),
    "half a meta": lambda path: (path / "meta.json").write_bytes(
        (path / "meta.json").read_bytes()[:99]
    ),
    "changed meta": damage_meta,
    "no optimizer": lambda path: (path / "optimizer-00000.safetensors").unlink(),
    "short weights": lambda path: (path / "model-00000.safetensors").write_bytes(b"x"),
    "one bit of the weights": lambda path: flip_bit(path / "model-00000.safetensors"),
    "one bit of the optimizer": lambda path: flip_bit(path / "optimizer-00000.safetensors"),
    "one bit of the random state": lambda path: flip_bit(path / "rank-00000.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    save_step(tmp_path, 1, value=1.0)
    DAMAGES[damage](save_step(tmp_path, 2, value=2.0))
    engine = one_rank()
    with caplog.at_level(logging.ERROR):
        resumed = load_latest(engine, tmp_path)
    assert resumed is not None
    assert resumed.path.name == "step-00000001"
    assert engine.dense[0, 0] == 1.0
    assert "step-00000002" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_run_starts_afresh_over_damaged_checkpoints(tmp_path: Path, damage: str) -> None:
    path = save_step(tmp_path, 2)
    DAMAGES[damage](path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        load_latest(one_rank(), tmp_path)


def test_damage_on_one_rank_stops_both(tmp_path: Path) -> None:
    world_size = World(2)
    path = world_size.run(
        lambda rank: save(
            FakeEngine(world_size, rank), root=tmp_path, step=1, state_json={}, rank_state={}
        )
    )[0]
    flip_bit(path / "optimizer-00001.safetensors")
    engines = [FakeEngine(world_size, rank) for rank in range(2)]
    errors = world_size.run(lambda rank: load(engines[rank], path))
    assert [type(error) for error in errors] == [DamagedCheckpointError] * 2
    assert "optimizer-00001.safetensors has SHA-256" in str(errors[0])
    assert [engine.loaded_names for engine in engines] == [[], []]


def test_a_strange_latest_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_step(tmp_path, 3)
    (tmp_path / "latest").write_text("../../etc\n")
    with caplog.at_level(logging.ERROR):
        assert find_latest(tmp_path) == tmp_path / "step-00000003"
    assert "no checkpoint's name" in caplog.text


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    path = save_step(tmp_path, 3)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(CheckpointError, match="format version 2"):
        read_meta(path)


def test_meta_says_what_was_saved(tmp_path: Path) -> None:
    meta = read_meta(save_step(tmp_path, 7))
    assert (meta.step, meta.state) == (7, STATE)
    assert meta.layout == one_rank().layout.to_json()
    for name, record in meta.files.items():
        data = (tmp_path / "step-00000007" / name).read_bytes()
        assert record == (len(data), hashlib.sha256(data).hexdigest())
