"""Build of the quickstart data set from small packages: splits, stamp, resuming, command line."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.content.image import decode_image
from data_pipeline.content.tokenizer import Tokenizer
from tests.unit.tools.quickstart_packages import HELD_OUT, NAMES, write_tarballs
from tools.quickstart_data import __main__ as command
from tools.quickstart_data import build as build_module
from tools.quickstart_data import render as render_module
from tools.quickstart_data.build import BuildSettings, build
from tools.quickstart_data.captions import PhraseSet, canonical
from tools.quickstart_data.render import SIDE
from tools.quickstart_data.sources import Package

SPLITS = ("train", "unseen_style", "unseen_concept")
HELD_OUT_CAPTIONS = {canonical(name) for name in HELD_OUT}


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory: pytest.TempPathFactory) -> dict[Package, Path]:
    return write_tarballs(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def fetch_calls(tarballs: dict[Package, Path], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the download; has one entry per call, the number of packages."""
    calls: list[int] = []

    def fake_fetch(packages: Sequence[Package], folder: Path) -> dict[Package, Path]:
        calls.append(len(packages))
        return tarballs

    monkeypatch.setattr(build_module, "fetch", fake_fetch)
    return calls


def settings(out: Path, **changes: Any) -> BuildSettings:
    # A limit above the number of drawings uses all of them, and permits a small vocabulary.
    return BuildSettings(**{"out": out, "limit": 1000, "processes": 1, **changes})


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples of a folder of shards, read with `tarfile`."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    return samples


def test_splits_and_counts(tmp_path: Path, fetch_calls: list[int]) -> None:
    counts = build(settings(tmp_path))
    assert 1 <= len(HELD_OUT_CAPTIONS) < len(NAMES) / 2  # or the test would show nothing
    samples = {split: read_samples(tmp_path / split) for split in SPLITS}
    texts = {
        split: [sample["txt"].decode() for sample in split_samples.values()]
        for split, split_samples in samples.items()
    }
    assert counts["images"] == {split: len(texts[split]) for split in SPLITS}
    assert counts["captions"] == {split: len(set(texts[split])) for split in SPLITS}

    assert set(texts["unseen_concept"]) == HELD_OUT_CAPTIONS
    assert not HELD_OUT_CAPTIONS & set(texts["train"])
    assert all(key.startswith("twemoji_") for key in samples["unseen_style"])
    assert not any(key.startswith("twemoji_") for key in samples["train"])
    all_captions = {canonical(name) for name in NAMES}
    assert set(texts["unseen_style"]) == all_captions - HELD_OUT_CAPTIONS
    labels = (tmp_path / "unseen_concept" / "labels.txt").read_text().splitlines()
    assert labels == sorted(HELD_OUT_CAPTIONS)


def test_contents_of_samples(tmp_path: Path, fetch_calls: list[int]) -> None:
    build(settings(tmp_path))
    for split in SPLITS:
        samples = read_samples(tmp_path / split)
        manifest = json.loads((tmp_path / split / "manifest.json").read_text())
        assert manifest["total_samples"] == len(samples)
        for sample in samples.values():
            fields = json.loads(sample["json"])
            assert fields["caption"] == fields["captions"][0] == sample["txt"].decode()
            assert fields["license"] and fields["author"] and fields["source"]
            assert decode_image(sample["webp"]).shape == (SIDE, SIDE, 4)
            if split == "train":  # no variant or tag may contain a held-out caption
                training_texts = [*fields["captions"], *fields["tags"]]
                held_out = PhraseSet(HELD_OUT_CAPTIONS)
                assert not [text for text in training_texts if text in held_out]


def test_tokenizer_and_attribution(tmp_path: Path, fetch_calls: list[int]) -> None:
    counts = build(settings(tmp_path))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size == counts["vocab_size"]
    assert "| OpenMoji |" in (tmp_path / "ATTRIBUTION.md").read_text()
    assert not (tmp_path / ".rendered").exists()


def test_complete_set_is_kept_and_modified_files_are_rebuilt(
    tmp_path: Path, fetch_calls: list[int]
) -> None:
    counts = build(settings(tmp_path))
    assert build(settings(tmp_path)) == counts and len(fetch_calls) == 1

    train = tmp_path / "train"
    before = {path.name: path.read_bytes() for path in train.iterdir()}
    shard = train / "shard-000000.tar"
    shard.write_bytes(before[shard.name][:-1] + b"x")
    (train / "notes.txt").write_text("a file of the user")
    assert build(settings(tmp_path)) == counts and len(fetch_calls) == 2
    before["notes.txt"] = b"a file of the user"
    assert {path.name: path.read_bytes() for path in train.iterdir()} == before

    (tmp_path / "tokenizer.model").unlink()
    build(settings(tmp_path))
    assert len(fetch_calls) == 3
    assert build(settings(tmp_path, limit=999)) == counts
    assert len(fetch_calls) == 4  # other settings


def test_interrupted_build_resumes(
    tmp_path: Path, fetch_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, interrupted = tmp_path / "a", tmp_path / "b"
    build(settings(uninterrupted))

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(settings(interrupted))
    assert not (interrupted / "stamp.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(render_module, "render", interrupt)  # nothing is rendered twice
        build(settings(interrupted))
    for name in (
        "train/shard-000000.tar",
        "unseen_style/manifest.json",
        "tokenizer.model",
        "stamp.json",
    ):
        assert (interrupted / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_limit_selects_the_same_concepts_of_all_sources(
    tmp_path: Path, fetch_calls: list[int]
) -> None:
    build(settings(tmp_path, limit=12))
    by_source: dict[str, set[str]] = {}
    for split in SPLITS:
        for key, sample in read_samples(tmp_path / split).items():
            by_source.setdefault(key.partition("_")[0], set()).add(sample["txt"].decode())
    assert by_source["noto"] == by_source["openmoji"] == by_source["twemoji"]
    assert {len(captions) for captions in by_source.values()} <= {12}


def test_command_line(
    tmp_path: Path,
    fetch_calls: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command.main(["--attribution"]) == 0
    assert "CC-BY-SA-4.0" in capsys.readouterr().out
    assert command.main(["--out", str(tmp_path), "--limit", "50", "--processes", "1"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"unseen_style +\d+ +\d+\n", output) and "is ready" in output

    def fail(*args: object) -> None:
        raise DataError("npm is not installed")

    monkeypatch.setattr(build_module, "fetch", fail)
    assert command.main(["--out", str(tmp_path / "new"), "--limit", "50"]) == 2
    assert capsys.readouterr().err.endswith("error: npm is not installed\n")


def test_unexpected_counts_are_marked() -> None:
    counts: dict[str, dict[str, int]] = {"images": {}, "captions": {}}
    for split, (images, captions) in command.EXPECTED.items():
        counts["images"][split], counts["captions"][split] = images, captions
    assert "expected" not in command.counts_table(counts, complete=True)
    counts["captions"]["train"] -= 1
    assert "expected (13203, 5401)" in command.counts_table(counts, complete=True)
