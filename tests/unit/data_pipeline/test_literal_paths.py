"""Paths whose names look like patterns: what exists is taken literally, by every command."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.common.literal_paths import split_literal
from data_pipeline.preparing.tasks import open_datasets
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.patterns import expand_patterns
from data_pipeline.shards.run_indexing import needs_indexing, open_manifest
from tests.support.data_commands import run_data_command
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png, make_shards

ODD = "photos [2020] {a,b} *? {0..3} }{"


def test_split_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1]" / "{b}").mkdir(parents=True)
    for address, beginning in {
        "a[1]/{b}": "a[1]/{b}",
        "a[1]/": "a[1]/",
        "a[1]/{b}/*.tar": "a[1]/{b}",
        "a[1]/b/*.tar": "a[1]",
        "a[2]/x.tar": "",
        "*.tar": "",
        f"file:{tmp_path}/a[1]/*.tar": f"file:{tmp_path}/a[1]",
        "s3://a[1]/{b}": "",
        "pipe:a": "",
        "/*": "",
        "": "",
    }.items():
        assert split_literal(address) == (beginning, address.removeprefix(beginning))


def test_patterns_after_an_odd_folder(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    for name in ("0.tar", "1.tar", "2.tar", "[x].tar"):
        (folder / name).touch()
    names = [f"{folder}/{name}" for name in ("0.tar", "1.tar", "2.tar", "[x].tar")]
    for pattern, expected in {
        "": names,
        "/*": names,
        "/**": names,
        "/{1,2}.tar": names[1:3],
        "/[01].tar": names[:2],
        "/[x].tar": names[3:],
    }.items():
        assert expand_patterns([f"{folder}{pattern}"]) == expected
        (tmp_path / "list.txt").write_text(f"{folder}{pattern}\n")
        assert expand_patterns([f"@{tmp_path}/list.txt"]) == expected
    assert expand_patterns([f"file:{folder}/[01].tar"]) == names[:2]
    with pytest.raises(DataError, match="unbalanced braces"):
        expand_patterns([f"{folder}/{{0,1.tar"])


@num_examples
def test_any_name_of_a_shard(examples: int) -> None:
    names = st.text("[]{}*?,!-.0a \\", min_size=1, max_size=8)
    check_property(check_names, examples, st.lists(names, min_size=1, max_size=3))


def check_names(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        parts = [name for name in names if name.strip(".")] or ["a"]
        path = Path(base, *parts[:-1], f"{parts[-1]}.tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert expand_patterns([str(path)]) == [str(path)]
        assert expand_patterns([str(path.parent)]) == [str(path)]


def test_manifests_of_odd_folders_are_used(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    manifest = make_shards(folder, count=7)
    assert not needs_indexing(str(folder))
    assert open_manifest(str(folder)).url == manifest.url
    assert [dataset.url for dataset in open_datasets([str(folder)])] == [manifest.url]
    (folder / "manifest.json").unlink()
    assert needs_indexing(str(folder)) and needs_indexing(f"{folder}/*.tar")
    assert open_manifest(str(folder)).total_samples == 7


def test_commands_with_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, shards = tmp_path / ODD, tmp_path / "out {0..1}[a]"
    images.mkdir()
    for number in range(4):
        (images / f"{number} [x]{{y}}*?.png").write_bytes(make_png(number))
        (images / f"{number} [x]{{y}}*?.txt").write_text(f"number {number}")
    table = images / "pairs [1].csv"
    lines = [f"{number} [x]{{y}}*?.png,caption {number}" for number in range(4)]
    table.write_text("\n".join(["image,caption", *lines]))

    for kind, source in (("folder", images), ("csv", table)):
        out = shards / f"{kind} [1]"
        run_data_command("write", kind, source, "--out", out, "--workers", 0)
        written = load_manifest(out)
        assert written.total_samples == 4
        (out / "manifest.json").unlink()
        run_data_command("index", out, "--workers", 0)
        assert load_manifest(out).fingerprint() == written.fingerprint()
        assert run_data_command("check", out, "--workers", 0) == 0
    capsys.readouterr()
    both = f"{shards}/{{folder,csv}} [1]"
    assert run_data_command("check", both, "--workers", 0) == 0
    assert "8 samples of 2 shards: all match" in capsys.readouterr().out
