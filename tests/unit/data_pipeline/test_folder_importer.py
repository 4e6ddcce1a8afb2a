"""Image folders: every file is in a sample, skipped with a reason, or ignored by a rule."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers import folder
from data_pipeline.preparing.importers.folder import Folder
from data_pipeline.preparing.importers.records import Ignored, Record, SkippedRow
from data_pipeline.shards.manifest import load_manifest
from tests.support.data_commands import run_data_command
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png


def add_pair(path: Path, name: str, suffix: str = ".png", text_suffix: str = ".txt") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}{suffix}").write_bytes(make_png(1))
    (path / f"{name}{text_suffix}").write_text(f"caption of {name}", encoding="utf-8")


def read(path: Path, **options: str) -> tuple[list[str], Counter[str], Counter[str]]:
    """Keys, numbers of skipped inputs by reason, and of ignored inputs by rule."""
    rows = list(Folder(folders=(str(path),), **options)())
    skipped: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, SkippedRow):
            skipped[row.reason] += row.inputs
        elif isinstance(row, Ignored):
            ignored[row.rule] += row.inputs
    return [row.key for row in rows if isinstance(row, Record)], skipped, ignored


def test_suffixes_of_images_in_any_case(tmp_path: Path) -> None:
    suffixes = [".jpg", ".JPEG", ".jfif", ".Jpe", ".pjpeg", ".dib", ".heic", ".jxl"]
    for index, suffix in enumerate(suffixes):
        add_pair(tmp_path, f"{index}", suffix, ".TXT" if index % 2 else ".txt")
    assert read(tmp_path) == ([str(index) for index in range(8)], Counter(), Counter())


def test_files_without_a_partner_are_skipped_and_others_are_ignored(tmp_path: Path) -> None:
    add_pair(tmp_path / "sub", "a")
    (tmp_path / "sub" / "a.json").write_text("{}")
    (tmp_path / "alone.png").write_bytes(make_png(1))
    (tmp_path / "alone-text.txt").write_text("x")
    (tmp_path / "alone.gif.txt").write_text("x")
    (tmp_path / "fields.json").write_text("{}")
    (tmp_path / "a.psd").write_bytes(b"x")
    (tmp_path / "noext").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.png").write_bytes(make_png(1))
    keys, skipped, ignored = read(tmp_path)
    assert keys == ["sub/a"]
    assert skipped == {"no-caption": 1, "no-image": 3}
    assert ignored == {".psd file": 1, "other file": 1, "hidden file": 2}


def test_texts_without_an_image_name_the_file_beside_them(tmp_path: Path) -> None:
    add_pair(tmp_path, "a", ".tga")
    add_pair(tmp_path, "b")
    for name in ("a.json", "B.TXT", "b.psd", "c.txt"):
        (tmp_path / name).write_text("{}")
    rows = list(Folder(folders=(str(tmp_path),))())
    skipped = {
        row.origin: f"{row.reason}: {row.detail}" for row in rows if isinstance(row, SkippedRow)
    }
    assert {*skipped} == {"a.txt", "a.json", "B.TXT", "c.txt"}
    assert (
        skipped["a.txt"].startswith("no-image: a.tga beside it") and "convert" in skipped["a.json"]
    )
    assert skipped["B.TXT"].startswith("several-texts: b.png has another one")
    assert skipped["c.txt"] == "no-image: there is no image with its name beside it"


def test_two_images_with_one_caption_file(tmp_path: Path) -> None:
    add_pair(tmp_path, "a")
    (tmp_path / "a.jpg").write_bytes(make_png(2))
    assert read(tmp_path)[0] == ["a", "a"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    add_pair(tmp_path / "disk", "a")
    add_pair(tmp_path / "images" / "own", "b")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "images" / "own" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "broken.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "images" / "pipe.txt")
    keys, skipped, ignored = read(tmp_path / "images")
    assert (keys, skipped, ignored) == (["linked/a", "own/b"], {"unreadable": 3}, {})


def test_captions_from_folder_names_ignore_text_files(tmp_path: Path) -> None:
    add_pair(tmp_path / "cat", "a")
    keys, skipped, ignored = read(tmp_path, caption_from="folder")
    assert (keys, sum(skipped.values()), sum(ignored.values())) == (["cat/a"], 0, 1)


def test_the_command_prints_counts_that_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        add_pair(tmp_path / "images", str(index))
    (tmp_path / "images" / "lost.txt").write_text("x")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"x")
    options = ["--out", tmp_path / "out", "--workers", 0]
    with pytest.raises(DataError, match="no-image 1"):
        run_data_command("write", "folder", tmp_path / "images", *options)

    options += ["--max-skipped-ratio", 0.3]
    assert run_data_command("write", "folder", tmp_path / "images", *options) == 0
    output = capsys.readouterr().out
    assert "8 files: 6 in samples, 1 skipped, 1 ignored (.db file 1)" in output
    inputs = {"unit": "files", "in_samples": 6, "skipped": 1, "ignored": {".db file": 1}}
    assert load_manifest(tmp_path / "out").metadata["inputs"] == inputs


def test_lost_files_are_found_by_the_second_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        add_pair(tmp_path, str(index))
    real_walk = folder._walk

    def walk_without_a_file(address: str) -> Iterator[folder._Subfolder]:
        for subfolder in real_walk(address):
            yield subfolder._replace(names=[name for name in subfolder.names if name != "1.txt"])

    monkeypatch.setattr(folder, "_walk", walk_without_a_file)
    with pytest.raises(DataError, match="has 6 files, but 5 were read"):
        list(Folder(folders=(str(tmp_path),))())


NAMES = ("a.jpg", "a.txt", "A.JSON", "b.PNG", "b.txt", "c.heic", ".hidden", "d", "e.psd", "e.txt")
FOLDERS = ("", "x", "x/y", ".z", "link")


@num_examples
def test_any_tree_is_accounted_for(examples: int, tmp_path: Path) -> None:
    def check(files: set[tuple[str, str]], caption_from: str) -> None:
        root, outside = tmp_path / "tree", tmp_path / "outside"
        for path in (root, outside):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        (root / "link").symlink_to(outside)
        for folder_name, name in files:
            (root / folder_name).mkdir(parents=True, exist_ok=True)
            (root / folder_name / name).write_bytes(b"{}")
        try:
            keys, _, ignored = read(root, caption_from=caption_from)
        except DataError as error:
            assert "no image" in str(error)
            return
        rows = list(Folder(folders=(str(root),), caption_from=caption_from)())
        total = sum(row.inputs for row in rows)
        # A hidden folder is one ignored input.
        command = ["find", "-L", str(root), "-name", ".z", "-prune", "-print"]
        command += ["-o", "-type", "f", "-print"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert total == len(listed.stdout.splitlines())
        images = sum(
            folder_name != ".z" and name in ("a.jpg", "b.PNG", "c.heic")
            for folder_name, name in files
        )
        no_caption = sum(isinstance(row, SkippedRow) and row.reason == "no-caption" for row in rows)
        assert len(keys) + no_caption == images and "no-image" not in ignored

    files = st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), max_size=20)
    check_property(check, examples, files, st.sampled_from(["text", "folder"]))


def test_the_time_is_linear_in_the_number_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = folder.strip_extension, Counter[str]()

    def counted(name: str) -> str:
        calls["all"] += 1
        return original(name)

    monkeypatch.setattr(folder, "strip_extension", counted)
    add_pair(tmp_path, "pair")
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text("x")
    assert read(tmp_path)[1] == {"no-image": 100}
    assert calls["all"] < 1000
