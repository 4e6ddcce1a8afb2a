from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.recipe import Recipe
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.order.drop import read_drop_list
from data_pipeline.preparing.filtering import filter_samples
from data_pipeline.preparing.visit import opened, tasks_of
from data_pipeline.samples import RawSample
from data_pipeline.settings import FilterConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data
from tests.support.small_shards import make_tokenizer

FILTERS = FilterConfig(
    min_side=20,
    max_aspect=2.5,
    min_caption_chars=3,
    max_caption_chars=12,
    require=("json:score >= 0.5", 'json:license in ["cc0", "cc-by"]'),
)


def make(folder: Path) -> Manifest:
    """60 samples with every reason to leave one out, and some that are broken."""
    rng, samples = np.random.default_rng(0), list[dict[str, object]]()
    for number in range(60):
        height, width = rng.integers(12, 60, 2).tolist()
        jpeg = bytes(
            cv2.imencode(".jpg", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))[1]
        )
        fields: dict[str, object] = {
            "score": float(rng.random() + 0.3),
            "license": ["cc0", "cc-by", "arr"][number % 3],
        }
        if number % 11 == 0:
            del fields["score"]
        samples.append(
            {
                "__key__": f"{number:03d}",
                "jpg": b"no" if number % 13 == 0 else jpeg,
                "txt": "x" * int(rng.integers(0, 16)),
                "json": b"[" if number % 17 == 0 else fields,
            }
        )
    return write_shards(samples, folder, samples_per_shard=25)


def reasons_in_training(manifest: Manifest, folder: Path) -> dict[tuple[int, int], str]:
    """What the loader's own recipe says about every sample."""
    recipe = Recipe(
        image_size=8,
        context_length=16,
        caption_keys=("txt",),
        caption_weights=(1.0,),
        filters=FILTERS,
    )
    tokenizer, reasons = Tokenizer.load(make_tokenizer(folder)), {}
    for task in tasks_of([manifest]):
        with opened(task) as shard:
            for number, raw in shard.samples():
                assert isinstance(raw, RawSample)
                try:
                    recipe.make(raw, 0, tokenizer)
                except DataError as error:
                    reasons[task.shard, number] = error.slug
    return reasons


def test_leaves_out_what_training_would(tmp_path: Path) -> None:
    manifest = make(tmp_path / "s")
    expected = reasons_in_training(manifest, tmp_path)
    assert len(set(expected.values())) >= 7, "the samples do not try every filter"
    done = filter_samples([manifest], FILTERS)
    found = {(shard, number) for shard, numbers in done.dropped[0].items() for number in numbers}
    assert found == set(expected)
    assert done.reasons == {
        reason: list(expected.values()).count(reason) for reason in expected.values()
    }
    assert filter_samples([manifest], FILTERS, workers=2).dropped == done.dropped


def test_options_a_section_and_a_run_file_mean_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "s")
    options = (
        "--min-side",
        20,
        "--max-aspect",
        2.5,
        "--min-caption-chars",
        3,
        "--max-caption-chars",
        12,
        "--require",
        "json:score >= 0.5",
        "--require",
        'json:license in ["cc0", "cc-by"]',
    )
    section = (
        "min_side: 20\nmax_aspect: 2.5\nmin_caption_chars: 3\nmax_caption_chars: 12\n"
        "require: ['json:score >= 0.5', 'json:license in [\"cc0\", \"cc-by\"]']\n"
    )
    (tmp_path / "plain.yaml").write_text(section)
    indented = "".join(f"    {line}\n" for line in section.splitlines())
    (tmp_path / "run.yaml").write_text(
        f"model: {{width: 5}}\ndata:\n  caption_keys: [txt]\n  filters:\n{indented}"
    )
    said = []
    for name, words in (
        ("o", options),
        ("p", ("--config", tmp_path / "plain.yaml")),
        ("r", ("--config", tmp_path / "run.yaml")),
    ):
        data("filter", tmp_path / "s", *words, "--drop-list", tmp_path / name, "--workers", 0)
        said.append(capsys.readouterr().out.split(str(tmp_path / name))[0])
    assert said[0] == said[1] == said[2]
    assert "filter:min-side" in said[0] and "kept" in said[0]
    lists = [(tmp_path / name).read_bytes() for name in "opr"]
    assert lists[0] == lists[1] == lists[2]
    assert read_drop_list(str(tmp_path / "o")).about["filters"]["min_side"] == 20
    data(
        "filter",
        tmp_path / "s",
        "--config",
        tmp_path / "plain.yaml",
        "--min-side",
        60,
        "--workers",
        0,
    )
    assert "filter:min-caption-chars" in capsys.readouterr().out


def test_a_filter_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    make(tmp_path / "s")
    for words, message in (
        ((), "there is no filter"),
        (("--require", "json:score >> 1"), "data.filters.require"),
        (("--min-side", -1), "below 0"),
        (("--min-side", 5, "--part", "0/2"), "--part needs --work"),
    ):
        with pytest.raises(ConfigError, match=message):
            data("filter", tmp_path / "s", *words, "--workers", 0)
    (tmp_path / "c.yaml").write_text("data: {filters: {min_sid: 5}}")
    with pytest.raises(ConfigError, match="did you mean 'min_side'"):
        data("filter", tmp_path / "s", "--config", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("data: {train: []}")
    with pytest.raises(ConfigError, match="has no filters"):
        data("filter", tmp_path / "s", "--config", tmp_path / "c.yaml")
