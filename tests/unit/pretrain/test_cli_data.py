"""`vlmoe data index` and `vlmoe tokenizer train` on small shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.shards.manifest import load_index, load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.cli.main import main


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with three samples each."""
    samples = [
        {
            "__key__": f"k{i}",
            "png": b"x",
            "txt": f"a red bird number {i}",
            "json": {"tags": ["bird", "red"]},
        }
        for i in range(6)
    ]
    write_shards(samples, tmp_path / "shards", samples_per_shard=3, metadata={"license": "MIT"})
    return tmp_path / "shards"


def test_index_restores_the_manifest_of_the_writer(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = (shards / "manifest.json").read_bytes()
    indices = list(shards.glob("*.index"))
    assert len(indices) == 2
    for index in indices:
        index.unlink()
    assert main(["data", "index", *map(str, sorted(shards.glob("*.tar")))]) == 0
    assert "2 shards, 6 samples" in capsys.readouterr().out
    assert (shards / "manifest.json").read_bytes() == manifest  # including the license

    (shards / "manifest.json").unlink()
    assert main(["data", "index", str(shards)]) == 0
    assert json.loads((shards / "manifest.json").read_text())["total_samples"] == 6


def test_index_of_an_empty_folder_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "shards" in error and str(tmp_path) in error


def test_index_names_a_truncated_shard(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = min(shards.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1500])
    assert main(["data", "index", str(shards)]) == 2
    assert str(shard) in capsys.readouterr().err


def test_tokenizer_train_uses_all_caption_keys(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.model"
    arguments = ["tokenizer", "train", str(shards), "--out", str(out), "--vocab-size", "277"]
    assert main([*arguments, "--caption-key", "txt", "--caption-key", "json:tags"]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed and "277" in printed
    tokenizer = Tokenizer.load(out)
    assert tokenizer.decode(tokenizer.encode("a red bird", 64)) == "a red bird"


def test_a_vocabulary_too_large_for_the_captions_is_an_error(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.model"
    arguments = ["tokenizer", "train", str(shards), "--out", str(out), "--vocab-size", "32000"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--vocab-size 32000 is too large" in error and "276" in error


def test_captions_of_several_keys(shards: Path) -> None:
    manifest = load_manifest(shards)
    captions = list(iter_captions([manifest], ["json:tags", "txt"]))
    assert captions[:3] == ["bird", "red", "a red bird number 0"]


def test_captions_of_corrupt_samples_are_skipped(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = load_manifest(shards)
    assert list(iter_captions([manifest], ["txt"])) == [f"a red bird number {i}" for i in range(6)]

    index = load_index(manifest, manifest.shards[0])
    shard = shards / manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    data[int(index.offsets[1]) + 512] ^= 1
    shard.write_bytes(data)
    captions = list(iter_captions([manifest], ["txt"]))
    assert captions == [f"a red bird number {i}" for i in (0, 2, 3, 4, 5)]
    assert "k1" in caplog.text and "crc-mismatch" in caplog.text
    assert "1 corrupt sample of 6" in caplog.text
