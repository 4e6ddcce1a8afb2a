"""Shards that cannot be had for a moment are not damaged ones: nothing that lasts may follow from
it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_pipeline.common import object_store
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import Kind
from data_pipeline.order.drop import read_drop_list
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.preparing.filtering import filter_samples
from data_pipeline.preparing.importers.table import Table
from data_pipeline.preparing.stats import measure
from data_pipeline.preparing.write import WritePlan, write_dataset
from data_pipeline.settings import FilterConfig
from tests.support.data_commands import data
from tests.support.http_shards import web_shards
from tests.support.small_shards import make_shards, picture

COMMANDS = {
    "check": (),
    "filter": ("--min-side", 1),
    "dedup": (),
    "stats": ("--samples", 0),
    "drawn": ("--samples", 20),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("gone", ["shard-000001.tar", "shard-000001.tar.index"])
def test_an_outage_is_named_and_leaves_nothing_behind(
    command: str, gone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drops = command in ("check", "filter", "dedup")
    with web_shards(tmp_path) as shards:
        name = command if command != "drawn" else "stats"
        line: list[str | Path | int] = [name, shards.web.url(), *COMMANDS[command]]
        line += ["--work", tmp_path / "work", "--workers", 0]
        line += ["--drop-list", tmp_path / "drop.json"] if drops else []
        (tmp_path / "data" / gone).rename(tmp_path / "away")
        assert data(*line) == 1
        said = capsys.readouterr().out
        assert (
            "not looked at: " in said
            and "shard-000001.tar: " in said
            and "1 shards could not be had" in said
        )
        assert len([path for path in (tmp_path / "work").rglob("*") if path.is_file()]) == 2
        if drops:
            assert read_drop_list(str(tmp_path / "drop.json")).total_samples == 0
        (tmp_path / "away").rename(tmp_path / "data" / gone)
        shards.web.requests.clear()
        assert data(*line) == 0
        assert "not looked at" not in capsys.readouterr().out
        read = {path.rpartition("/")[2] for _, path, _ in shards.web.requests if ".tar" in path}
        assert read == {"shard-000001.tar", "shard-000001.tar.index"}, (
            "more than what was missing was read"
        )


def test_a_store_that_refuses_all_damages_nothing(tmp_path: Path) -> None:
    with web_shards(tmp_path) as shards:
        url = shards.web.url()
        line = (
            "filter",
            url,
            "--min-side",
            1,
            "--work",
            tmp_path / "work",
            "--drop-list",
            tmp_path / "drop.json",
        )
        # A share of a job array in the same case.
        part = (*line, "--workers", 0, "--part", "0/1")
        shards.web.query = "only=the-manifest-is-free"
        done = filter_samples(
            [shards.manifest], FilterConfig(min_side=1), work=str(tmp_path / "work")
        )
        assert (done.samples, done.reasons.total(), done.dropped, len(done.unread)) == (
            0,
            0,
            [{}],
            3,
        )
        shards.web.query = ""
        assert data(*part) == 0
        assert read_drop_list(str(tmp_path / "drop.json")).total_samples == 0


def test_proven_damage_in_a_store_is_kept_and_dropped(tmp_path: Path) -> None:
    with web_shards(tmp_path) as shards:
        path = tmp_path / "data" / "shard-000001.tar"
        path.write_bytes(path.read_bytes()[:3000])
        index = tmp_path / "data" / "shard-000002.tar.index"
        index.write_bytes(index.read_bytes()[:-9] + b"123456789")
        line = (
            "check",
            shards.web.url(),
            "--drop-list",
            tmp_path / "drop.json",
            "--workers",
            0,
            "--work",
            tmp_path / "work",
        )
        assert data(*line) == 1
        dropped = read_drop_list(str(tmp_path / "drop.json")).total_samples
        assert dropped >= 12
        assert len([found for found in (tmp_path / "work").rglob("*") if found.is_file()]) == 3


def test_a_disk_that_fails_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "s", count=14)

    def failing(fd: int, count: int, offset: int) -> bytes:
        raise OSError(116, "Stale file handle")

    line = (
        "check",
        tmp_path / "s",
        "--drop-list",
        tmp_path / "d",
        "--work",
        tmp_path / "w",
        "--workers",
        0,
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        assert data(*line) == 1
    assert read_drop_list(str(tmp_path / "d")).total_samples == 0
    assert data(*line) == 0


def test_a_shorter_object_is_damage_where_samples_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_shards(tmp_path) as shards:
        path = tmp_path / "data" / "shard-000001.tar"
        path.write_bytes(path.read_bytes()[:3000])
        stats = measure([shards.manifest], samples=20)
        assert not stats.unread and stats.bad["truncated"] >= 4

        def away(*args: object, **options: object) -> bytes:
            raise StorageError("the store is away", kind=Kind.UNREACHABLE)

        monkeypatch.setattr(object_store, "read_range", away)
        assert [row.reason for row in measure([shards.manifest], samples=20).unread] == [
            "unreachable"
        ] * 3


def test_a_tokenizer_is_not_trained_without_the_shards_that_are_away(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=14)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar cannot be had \(missing-shard\)"):
        list(captions_of([manifest], ["txt"]))


def test_write_asks_again_for_pictures_that_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(20):
        (tmp_path / "p" / f"{number}.png").write_bytes(picture(number))
    rows = "".join(f"{number}.png,c{number}\n" for number in range(20))
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    plan = WritePlan(
        source=Table(files=(str(tmp_path / "t.csv"),), pictures=str(tmp_path / "p")),
        out=str(tmp_path / "out"),
        samples_per_shard=10,
        max_left_out=0.5,
    )
    for name in ("7.png", "12.png"):
        (tmp_path / "p" / name).rename(tmp_path / name)
    first = write_dataset(plan)
    assert (first.samples, first.reused) == (18, 0)
    again = write_dataset(plan)
    assert (again.samples, again.reused, again.left_out) == (18, 2, first.left_out), (
        "nothing came back"
    )
    (tmp_path / "7.png").rename(tmp_path / "p" / "7.png")
    healed = write_dataset(plan)
    assert (healed.samples, healed.reused) == (19, 1)
    [row] = (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()
    assert json.loads(row)["origin"] == "t.csv line 14"
    (tmp_path / "12.png").rename(tmp_path / "p" / "12.png")
    assert (write_dataset(plan).samples, write_dataset(plan).reused) == (20, 2)
