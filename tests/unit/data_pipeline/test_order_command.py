"""`vlmoe data order`: what it prints is what training reads."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import open_sources
from data_pipeline.order.drop import make_drop_list, write_drop_list
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.cli.main import main
from pretrain.config.presets import load_run, run_path
from tests.support.small_shards import make_shards, make_tokenizer, picture

RUN = """\
data:
  train:
    - {{shards: {folder}/first, name: photos, weight: 3}}
    - {{shards: {folder}/second, weight: 1, drop: {folder}/drop.json}}
  tokenizer: {tokenizer}
  shuffle_window: 2
  workers: 0
model: {{vocab_size: 300, context_length: 16, image_size: 16, patch_size: 8}}
batch: {{global_batch_size: 16, micro_batch_size: 4}}
schedule: {{total_steps: 10, warmup_steps: 1}}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    make_shards(folder / "first", count=25)
    second = make_shards(folder / "second", count=9, samples_per_shard=4, first=100)
    write_drop_list(folder / "drop.json", make_drop_list(second, {1: [0, 3]}))
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, tokenizer=make_tokenizer(folder)))
    return path


def order(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", "order", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("world_size", "skip"), [(1, ()), (2, ()), (4, ((20, 30), (40, 41)))])
def test_it_says_what_the_loader_reads(
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
    world_size: int,
    skip: tuple[tuple[int, int], ...],
) -> None:
    more = [option for first, end in skip for option in ("--skip", f"{first}:{end}")]
    told = json.loads(
        order(
            capsys,
            str(run_file),
            "--steps",
            "1:4",
            "--world-size",
            str(world_size),
            "--json",
            *more,
        )
    )
    run = load_run(run_path(str(run_file)), [])
    for rank in range(world_size):
        loader = Loader(
            sources=open_sources(run.data.sources),
            tokenizer_path=run.data.tokenizer,
            data=run.data,
            image_size=8,
            context_length=16,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            global_batch_size=16,
            micro_batch_size=4,
            state=LoaderState(skip=skip),
        )
        with closing(loader):
            for step, (batches, state) in zip(told["steps"], loader.steps(), strict=False):
                mine = [micro for micro in step["micro_batches"] if micro["rank"] == rank]
                assert [[row["key"] for row in micro["samples"]] for micro in mine] == [
                    list(b.keys) for b in batches
                ]
                assert step["position_after"] == state.position
    rows = [
        row for step in told["steps"] for micro in step["micro_batches"] for row in micro["samples"]
    ]
    positions = [row["position"] for row in rows]
    gone = {place for first, end in skip for place in range(first, end)}
    assert positions == [place for place in range(200) if place not in gone][: 4 * 16]
    assert {row["source"] for row in rows} == {"photos", "second"}
    assert {row["epoch"] for row in rows if row["source"] == "second"} == {0, 1, 2}


def test_people_can_read_it(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = order(
        capsys, str(run_file), "--steps", "2", "--world-size", "2", "batch.micro_batch_size=8"
    )
    lines = out.splitlines()
    assert lines[0] == "step 2"
    assert lines[1] == "  rank 0, micro-batch 0"
    assert lines[2].split() == ["position", "source", "epoch", "shard", "sample", "key"]
    assert lines[11] == "  rank 1, micro-batch 0"
    assert lines[3].split()[:2] == ["16", "photos"]
    row = dict(zip(lines[2].split(), lines[3].split(), strict=True))
    shards = [entry.name for entry in load_manifest(run_file.parent / "first").shards]
    assert row["key"] == f"{7 * shards.index(row['shard']) + int(row['sample']):05d}"


def test_a_shard_without_its_index_is_named(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = load_manifest(run_file.parent / "first").shards[0]
    index = run_file.parent / "first" / entry.index
    data = index.read_bytes()
    index.unlink()
    try:
        rows = [
            line.split() for line in order(capsys, str(run_file), "--steps", "1:2").splitlines()
        ]
        mine = [
            row for row in rows if len(row) == 6 and row[1] == "photos" and row[3] == entry.name
        ]
        assert {row[5] for row in mine} == {"#bad-index"}
        assert "#bad-index" not in order(capsys, str(run_file), "--steps", "1:2", "--no-keys")
    finally:
        index.write_bytes(data)


def test_the_quality_of_each_source(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = order(capsys, str(run_file), "--quality")
    assert "photos: 25 samples in 4 shards, shuffle_window 2, 12 of them in a batch" in out
    assert "second: 7 samples in 3 shards, shuffle_window 2, 4 of them in a batch" in out
    found = json.loads(order(capsys, str(run_file), "--quality", "--json"))
    assert set(found) == {"photos", "second"}
    assert found["photos"]["shuffled"]["distance_mean"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "3:2"],
        ["--steps", "x"],
        ["--world-size", "0"],
        ["--skip", "a:b"],
    ],
)
def test_impossible_arguments_are_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["data", "order", str(run_file), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_an_impossible_split_is_an_error(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "order", str(run_file), "--world-size", "3"]) == 2
    assert "global_batch_size is 16" in capsys.readouterr().err


def test_keys_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "\x1b]0;title\x07\x9b2J\u202e"
    samples = [
        {"__key__": f"{key}{number}", "png": picture(number), "txt": "x"} for number in range(16)
    ]
    for name in ("first", "second"):
        write_shards(samples, tmp_path / name, samples_per_shard=8)
    write_drop_list(tmp_path / "drop.json", make_drop_list(load_manifest(tmp_path / "second"), {}))
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, tokenizer=make_tokenizer(tmp_path)))
    said = order(capsys, str(path))
    assert not set("\x1b\x07\x9b\u202e") & set(said) and r"\x1b]0;title\x07\x9b2J\u202e1" in said
    found = order(capsys, str(path), "--json")
    assert found.isascii() and json.loads(found)["steps"][0]["micro_batches"][0]["samples"][0][
        "key"
    ].startswith(key)
