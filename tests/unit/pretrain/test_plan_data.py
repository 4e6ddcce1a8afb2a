"""`vlmoe plan` opens the data and the tokenizer that a run names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards.manifest import MANIFEST_NAME
from pretrain.cli.main import main
from tests.support.shape_dataset import ShapeDataset, make_shape_dataset


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapeDataset:
    return make_shape_dataset(tmp_path_factory.mktemp("shapes"), pairs=32, samples_per_shard=8)


def plan(*arguments: str) -> int:
    settings = ["batch.global_batch_size=8", "batch.micro_batch_size=8", "schedule.warmup_steps=0"]
    return main(["plan", "tiny", *settings, "schedule.total_steps=12", *arguments])


def test_sources_and_tokenizer(shapes: ShapeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*shapes.overrides, "data.filters.max_caption_chars=21", "model.context_length=8"]
    assert plan("--json", *settings) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)["data"]
    (source,) = data["sources"]
    assert (source["pairs"], source["shards"], source["epochs"]) == (32, 4, 3.0)
    assert source["tried"] == 32 and 2 < source["mean_tokens"] <= 8
    assert list(source["skipped"]) == ["filter:max-caption-chars"]
    assert 0 < source["skipped"]["filter:max-caption-chars"] < 32

    assert plan(*settings) == 0
    text = capsys.readouterr().out
    assert "32 pairs in 4 shards; read 3 times; " in text
    assert f"of 32 tried: {'filter:max-caption-chars'} " in text
    assert f"{data['tokenizer']['tokens']} tokens" in text


def test_a_mixture_with_shards_without_manifest(
    shapes: ShapeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in shapes.folder.glob("*.tar"):
        (bare / shard.name).write_bytes(shard.read_bytes())
    settings = [*shapes.overrides, f"data.train=[{bare}, {{shards: {shapes.folder}, name: known}}]"]
    assert plan(*settings) == 0
    text = capsys.readouterr().out
    assert "source bare   4 shards without a manifest, so its pairs are not known" in text
    assert "source known  32 pairs in 4 shards; " in text and "read" not in text
    assert not (bare / MANIFEST_NAME).exists()

    # Equal names are distinguished, also of a source with a manifest and one without.
    same = bare.rename(tmp_path / shapes.folder.name)
    assert plan(*shapes.overrides, f"data.train=[{same}, {shapes.folder}]") == 0
    text = capsys.readouterr().out
    for folder in (same, shapes.folder):
        assert f"source {folder.parent.name}/{folder.name}  " in text


def test_problems_and_offline(shapes: ShapeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    for override, message in (
        ("data.train=[/no/such/folder]", "data.train: "),
        ("data.tokenizer=no.model", "no.model"),
        ("model.vocab_size=999", "model.vocab_size is 999"),
        ("data.filters.require=['json:score >= 1']", "are skipped (filter:"),
    ):
        assert plan(*shapes.overrides, override) == 2
        assert message in capsys.readouterr().err
        assert plan(*shapes.overrides, override, "--offline") == 0
        assert "source" not in capsys.readouterr().out
