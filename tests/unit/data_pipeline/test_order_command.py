"""`vlmoe data order`: its output is the order that the loader reads."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import open_sources
from data_pipeline.order.drop_list import make_drop_list, write_drop_list
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.run_indexing import index_for_run, run_manifest_folder
from data_pipeline.shards.writer import write_shards
from pretrain.cli.main import main
from pretrain.config.presets import load_run, run_path
from tests.support.small_shards import make_png, make_shards, make_tokenizer

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


def run_order(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", "order", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("world_size", "skip"), [(1, ()), (2, ()), (4, ((20, 30), (40, 41)))])
def test_output_matches_the_loader(
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
    world_size: int,
    skip: tuple[tuple[int, int], ...],
) -> None:
    arguments = [str(run_file), "--steps", "1:4", "--world-size", str(world_size), "--json"]
    for first, end in skip:
        arguments += ["--skip", f"{first}:{end}"]
    steps = json.loads(run_order(capsys, *arguments))["steps"]

    run = load_run(run_path(str(run_file)), [])
    for rank in range(world_size):
        loader = Loader(
            sources=open_sources(run.data.sources),
            tokenizer=Tokenizer.load(run.data.tokenizer),
            data=run.data,
            batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=4),
            global_batch_size=16,
            seed=run.seed,
            ranks=RankInfo(rank=rank, world_size=world_size),
            state=LoaderState(skip=skip),
        )
        with closing(loader):
            for step, (batches, state) in zip(steps, loader.steps(), strict=False):
                keys = [
                    [row["key"] for row in micro["samples"]]
                    for micro in step["micro_batches"]
                    if micro["rank"] == rank
                ]
                assert keys == [list(batch.keys) for batch in batches]
                assert step["position_after"] == state.position

    rows = [row for step in steps for micro in step["micro_batches"] for row in micro["samples"]]
    skipped = {position for first, end in skip for position in range(first, end)}
    expected = [position for position in range(200) if position not in skipped]
    assert [row["position"] for row in rows] == expected[: 4 * 16]
    assert {row["source"] for row in rows} == {"photos", "second"}
    assert {row["epoch"] for row in rows if row["source"] == "second"} == {0, 1, 2}


def test_table(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_order(
        capsys, str(run_file), "--steps", "2", "--world-size", "2", "batch.micro_batch_size=8"
    )
    lines = out.splitlines()
    assert lines[0] == "step 2"
    assert lines[1] == "  rank 0, micro-batch 0"
    header = ["position", "source", "epoch", "shard", "sample", "key"]
    assert lines[2].split() == header
    assert lines[11] == "  rank 1, micro-batch 0"
    assert lines[3].split()[:2] == ["16", "photos"]

    row = dict(zip(header, lines[3].split(), strict=True))
    shards = [entry.name for entry in load_manifest(run_file.parent / "first").shards]
    assert row["key"] == f"{7 * shards.index(row['shard']) + int(row['sample']):05d}"


def test_missing_index(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = load_manifest(run_file.parent / "first").shards[0]
    index = run_file.parent / "first" / entry.index
    data = index.read_bytes()
    index.unlink()
    try:
        out = run_order(capsys, str(run_file), "--steps", "1:2")
        rows = [line.split() for line in out.splitlines()]
        keys = {row[5] for row in rows if len(row) == 6 and row[1:4:2] == ["photos", entry.name]}
        assert keys == {"#corrupt-index"}

        without_keys = run_order(capsys, str(run_file), "--steps", "1:2", "--no-keys")
        assert "#corrupt-index" not in without_keys
    finally:
        index.write_bytes(data)


def test_shards_without_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are indexed as in training, unless the run folder has their manifest."""
    shards, run_folder = tmp_path / "shards", tmp_path / "run"
    make_shards(shards, count=25)
    run_folder.mkdir()
    path = run_folder / "config.yaml"
    path.write_text("batch: {global_batch_size: 8, micro_batch_size: 4}\n")

    def order(address: str) -> list[str]:
        out = run_order(capsys, str(path), "--steps", "1:3", f"data.train=['{address}']", "--json")
        steps = json.loads(out)["steps"]
        return [row["key"] for s in steps for m in s["micro_batches"] for row in m["samples"]]

    expected = order(str(shards))
    (shards / "manifest.json").unlink()
    for file in shards.glob("*.index"):
        file.unlink()
    before = set(tmp_path.rglob("*"))
    assert order(str(shards)) == order(f"{shards}/*.tar") == expected
    assert set(tmp_path.rglob("*")) == before, "written next to the run or the shards"

    index_for_run(str(shards), run_manifest_folder(run_folder, str(shards)))
    sorted(shards.glob("*.tar"))[0].unlink()  # a resumed run does not index again either
    assert order(str(shards)) == expected


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("data.train=[]", ["data.train is empty"]),
        ("data.train=[{}]", ["no manifest", "vlmoe data index"]),
    ],
)
def test_no_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, parts: list[str]
) -> None:
    assert main(["data", "order", "tiny", setting.format(tmp_path)]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error


def test_shuffle_quality_of_each_source(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_order(capsys, str(run_file), "--quality")
    assert "photos: 25 samples in 4 shards, shuffle_window 2, 12 of them in a batch" in out
    assert "second: 7 samples in 3 shards, shuffle_window 2, 4 of them in a batch" in out
    qualities = json.loads(run_order(capsys, str(run_file), "--quality", "--json"))
    assert set(qualities) == {"photos", "second"}
    assert qualities["photos"]["shuffled"]["distance_mean"] > 0


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
def test_invalid_arguments(
    run_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["data", "order", str(run_file), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_global_batch_that_cannot_be_divided(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "order", str(run_file), "--world-size", "3"]) == 2
    assert "global_batch_size is 16" in capsys.readouterr().err


def test_control_characters_in_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "\x1b]0;title\x07\x9b2J\u202e"
    samples = [{"__key__": f"{key}{i}", "png": make_png(i), "txt": "x"} for i in range(16)]
    for name in ("first", "second"):
        write_shards(samples, tmp_path / name, samples_per_shard=8)
    write_drop_list(tmp_path / "drop.json", make_drop_list(load_manifest(tmp_path / "second"), {}))
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, tokenizer=make_tokenizer(tmp_path)))

    out = run_order(capsys, str(path))
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert r"\x1b]0;title\x07\x9b2J\u202e1" in out

    out = run_order(capsys, str(path), "--json")
    assert out.isascii()
    first_sample = json.loads(out)["steps"][0]["micro_batches"][0]["samples"][0]
    assert first_sample["key"].startswith(key)
