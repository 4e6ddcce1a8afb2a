"""Filters, captions, images and augmentation of one source of a mixture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_pipeline import Loader
from data_pipeline.common.config import from_mapping
from data_pipeline.common.errors import ConfigError
from data_pipeline.content.image import decode_image, eval_transform
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.preview import SourcePreview, _select, preview_source
from data_pipeline.loading.sources import Source, open_sources
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig, SourceConfig
from data_pipeline.shards.writer import write_shards
from pretrain.config.schema import RunConfig
from pretrain.plan.sample_check import check_some_samples
from tests.support.small_shards import make_shards, make_tokenizer

SIDE, COUNT = 16, 12


def make_image(index: int, extension: str) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    return bytes(cv2.imencode(f".{extension}", pixels)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: `web` with a similarity, and `coco` with captions in JSON and two images."""
    folder = tmp_path_factory.mktemp("sources")
    write_shards(
        (
            {
                "__key__": f"web{index}",
                "png": make_image(index, "png"),
                "txt": f"web {index}",
                "json": {"similarity": index / COUNT},
            }
            for index in range(COUNT)
        ),
        folder / "web",
        samples_per_shard=5,
    )
    write_shards(
        (
            {
                "__key__": f"coco{index}",
                "left.png": make_image(100 + index, "png"),
                "right.png": make_image(200 + index, "png"),
                "json": {"text": f"coco {index}"},
            }
            for index in range(COUNT)
        ),
        folder / "coco",
        samples_per_shard=5,
    )
    make_tokenizer(folder)
    return folder


def read_epoch(folder: Path, coco: dict[str, Any], **settings: Any) -> list[Batch]:
    values = {
        "tokenizer": str(folder / "tokenizer.model"),
        "workers": 0,
        "filters": {"require": ["json:similarity >= 0.5"]},
        "train": [{"shards": str(folder / "web")}, {"shards": str(folder / "coco")} | coco],
    }
    data = from_mapping(DataConfig, values | settings)
    loader = Loader.open(data, image_size=SIDE, context_length=16, global_batch_size=8)
    batches = [
        batch for _, (step, _) in zip(range(3), loader.steps(), strict=False) for batch in step
    ]
    loader.close()
    return batches


def test_each_source_has_its_filters_and_keys(folder: Path) -> None:
    # Two keys without weights are weighted equally; only one of them exists.
    keys = ["json:text", "json:none"]
    coco = {"filters": {}, "caption_keys": keys, "image_keys": ["right.png"]}
    batches = read_epoch(folder, coco)
    captions = {key: text for b in batches for key, text in zip(b.keys, b.captions, strict=True)}
    web = {f"web{index}": f"web {index}" for index in range(6, 12)}
    assert captions == web | {f"coco{index}": f"coco {index}" for index in range(COUNT)}
    problems = [problem for batch in batches for problem in batch.problems]
    assert {(p.key, p.reason) for p in problems} == {
        (f"web{index}", "filter:similarity") for index in range(6)
    }


def test_the_image_of_a_source_has_its_key_and_mode(folder: Path) -> None:
    coco = {
        "filters": {},
        "caption_keys": ["json:text"],
        "image_keys": ["right.png"],
        "image_mode": "squash",
    }
    images = {
        key: image.numpy()
        for batch in read_epoch(folder, coco, filters={})
        for key, image in zip(batch.keys, batch.images, strict=True)
    }
    assert len(images) == 2 * COUNT
    for index in range(COUNT):
        web = eval_transform(decode_image(make_image(index, "png")), SIDE)
        right = eval_transform(decode_image(make_image(200 + index, "png")), SIDE, "squash")
        np.testing.assert_array_equal(images[f"web{index}"], web)
        np.testing.assert_array_equal(images[f"coco{index}"], right)


def test_run_wide_filters_apply_to_sources_without_their_own(folder: Path) -> None:
    batches = read_epoch(folder, {"caption_keys": ["json:text"], "image_keys": ["left.png"]})
    assert not [key for batch in batches for key in batch.keys if key.startswith("coco")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_keys": [".JPG"]}, "source coco.*image_keys"),
        ({"caption_keys": ["png"]}, "source coco.*caption_keys"),
        ({"caption_weights": [1, 2]}, "source coco.*caption_weights has 2 values for 1"),
        ({"image_mode": "stretch"}, "image_mode"),
        ({"filters": {"min_side": -1}}, "min_side"),
        ({"filters": {"minside": 1}}, "minside: no such setting"),
    ],
)
def test_invalid_settings_of_a_source(settings: dict[str, Any], message: str) -> None:
    values = {"train": [{"shards": "coco"} | settings]}
    with pytest.raises(ConfigError, match=message):
        from_mapping(DataConfig, values)


def preview(folder: Path, shards: str, **settings: Any) -> SourcePreview:
    values = {"tokenizer": str(folder / "tokenizer.model"), "train": [str(folder / shards)]}
    data = from_mapping(DataConfig, values | settings)
    (source,) = open_sources(data.sources)
    batch = BatchSpec(image_size=SIDE, context_length=6, micro_batch_size=4)
    return preview_source(source, data, tokenizer=Tokenizer.load(data.tokenizer), batch=batch)


def test_preview_of_a_source(folder: Path) -> None:
    web = preview(folder, "web", filters={"require": ["json:similarity >= 0.5"]})
    assert (web.name, web.samples, web.skipped) == ("web", COUNT, {"filter:similarity": 6})
    assert web.skipped_ratio == 0.5 and "filter:similarity" in web.example
    assert web.truncated == 6  # "<start> web N <end>" has more than six tokens

    coco = preview(folder, "coco", filters={"require": ["json:similarity >= 0.5"]})
    assert coco.skipped_ratio == 1
    assert preview(folder, "coco", caption_keys=["json:text"]).skipped == {"no-image": COUNT}
    whole = preview(folder, "coco", caption_keys=["json:text"], image_keys=["left.png"])
    assert (whole.skipped, whole.example) == ({}, "")


def test_sources_without_usable_samples_stop_a_run(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = [{"shards": str(folder / name)} for name in ("web", "coco")]
    values = {
        "data": {
            "train": train,
            "tokenizer": str(folder / "tokenizer.model"),
            "filters": {"require": ["json:similarity >= 0.8"]},
        },
        "model": {"image_size": SIDE, "patch_size": 8, "context_length": 6},
    }
    run = from_mapping(RunConfig, values, check=False)
    sources = open_sources(run.data.sources)
    with pytest.raises(ConfigError, match=r"source coco: 12 of 12 samples .*filter:similarity"):
        check_some_samples(run, sources, Tokenizer.load(run.data.tokenizer))
    messages = "\n".join(caplog.messages)
    assert "source web: 10 of 12 samples that were tried are skipped" in messages
    assert "source web: 2 of 2 captions have more than model.context_length (6)" in messages


def test_one_corrupt_shard_does_not_decide(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "web", tmp_path / "web")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    first = tmp_path / "web" / "shard-000000.tar"
    first.write_bytes(b"x" * first.stat().st_size)
    result = preview(tmp_path, "web")
    assert (result.samples, result.skipped) == (COUNT, {"crc-mismatch": 5})
    for shard in (tmp_path / "web").glob("*.tar"):
        shard.write_bytes(b"x" * shard.stat().st_size)
    corrupt = preview(tmp_path, "web")
    assert corrupt.skipped_ratio == 1 and not corrupt.is_unusable


def test_samples_are_spread_over_shards_without_dropped_ones(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=2000, samples_per_shard=100)
    dropped = {0: np.arange(0, 90), 19: np.arange(100)}
    source = Source(manifest=manifest, config=SourceConfig(shards="x"), dropped=dropped)
    selected = _select(source)
    shards, samples = np.divmod(selected, 100)
    assert len(set(shards.tolist())) == 7 and {0, 3, 5, 16} <= set(shards.tolist())
    assert sorted(samples[shards == 0].tolist()) == list(range(90, 100))
    assert sorted(samples[shards == 3].tolist()) == list(range(32))
    assert len(set(shards[:7].tolist())) == 7  # a batch has samples of several shards
