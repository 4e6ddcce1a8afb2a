from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.order.drop_list import read_drop_list
from data_pipeline.preparing.filtering import filter_samples
from data_pipeline.preparing.shard_access import read_samples
from data_pipeline.preparing.tasks import shard_tasks
from data_pipeline.samples import RawSample
from data_pipeline.settings import FilterConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_tokenizer

FILTERS = FilterConfig(
    min_side=20,
    max_aspect=2.5,
    min_caption_chars=3,
    max_caption_chars=12,
    require=("json:score >= 0.5", 'json:license in ["cc0", "cc-by"]'),
)
OPTIONS = (
    *("--min-side", 20, "--max-aspect", 2.5),
    *("--min-caption-chars", 3, "--max-caption-chars", 12),
    *("--require", "json:score >= 0.5"),
    *("--require", 'json:license in ["cc0", "cc-by"]'),
)
YAML = """\
min_side: 20
max_aspect: 2.5
min_caption_chars: 3
max_caption_chars: 12
require: ['json:score >= 0.5', 'json:license in ["cc0", "cc-by"]']
"""


def write_samples(folder: Path) -> Manifest:
    """60 samples that cover every filter, some of them corrupt."""
    rng, samples = np.random.default_rng(0), list[dict[str, object]]()
    for number in range(60):
        height, width = rng.integers(12, 60, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        jpeg = bytes(cv2.imencode(".jpg", pixels)[1])
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
    """The reason why training excludes a sample, by (shard, sample)."""
    processor = SampleProcessor(
        image_size=8,
        context_length=16,
        caption_keys=("txt",),
        caption_weights=(1.0,),
        filters=FILTERS,
    )
    tokenizer, reasons = Tokenizer.load(make_tokenizer(folder)), {}
    for task in shard_tasks([manifest]):
        for sample, raw in read_samples(task):
            assert isinstance(raw, RawSample)
            try:
                processor.process(raw, 0, tokenizer)
            except DataError as error:
                reasons[task.shard, sample] = error.slug
    return reasons


def test_excludes_the_same_samples_as_training(tmp_path: Path) -> None:
    manifest = write_samples(tmp_path / "s")
    expected = reasons_in_training(manifest, tmp_path)
    assert len(set(expected.values())) >= 7, "the samples do not cover every filter"

    report = filter_samples([manifest], FILTERS)
    dropped = {(shard, row) for shard, rows in report.dropped[0].items() for row in rows}
    assert dropped == set(expected)
    assert report.reasons == Counter(expected.values())
    assert filter_samples([manifest], FILTERS, workers=2).dropped == report.dropped


def test_options_and_config_files_are_equivalent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "s")
    (tmp_path / "plain.yaml").write_text(YAML)
    indented = "".join(f"    {line}\n" for line in YAML.splitlines())
    (tmp_path / "run.yaml").write_text(
        f"model: {{width: 5}}\ndata:\n  caption_keys: [txt]\n  filters:\n{indented}"
    )

    outputs = []
    for name, options in (
        ("o", OPTIONS),
        ("p", ("--config", tmp_path / "plain.yaml")),
        ("r", ("--config", tmp_path / "run.yaml")),
    ):
        drop_list = ("--drop-list", tmp_path / name)
        run_data_command("filter", tmp_path / "s", *options, *drop_list, "--workers", 0)
        outputs.append(capsys.readouterr().out.split(str(tmp_path / name))[0])

    assert outputs[0] == outputs[1] == outputs[2]
    assert "filter:min-side" in outputs[0] and "kept" in outputs[0]
    drop_lists = [(tmp_path / name).read_bytes() for name in "opr"]
    assert drop_lists[0] == drop_lists[1] == drop_lists[2]
    assert read_drop_list(str(tmp_path / "o")).about["filters"]["min_side"] == 20


def test_options_override_the_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "s")
    (tmp_path / "plain.yaml").write_text(YAML)
    options = ("--config", tmp_path / "plain.yaml", "--min-side", 60, "--workers", 0)
    run_data_command("filter", tmp_path / "s", *options, "--drop-list", tmp_path / "d")
    assert "filter:min-caption-chars" in capsys.readouterr().out
    filters = read_drop_list(str(tmp_path / "d")).about["filters"]
    assert (filters["min_side"], filters["min_caption_chars"]) == (60, 3)


def test_invalid_filters_are_rejected(tmp_path: Path) -> None:
    write_samples(tmp_path / "s")
    for options, message in (
        ((), "no filter.*--config"),
        (("--require", "json:score >> 1"), "data.filters.require"),
        (("--min-side", -1), "min_side"),
        (("--min-side", 5, "--part", "0/2"), "--part needs --work-dir"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_data_command("filter", tmp_path / "s", *options, "--workers", 0)

    config = tmp_path / "c.yaml"
    config.write_text("data: {filters: {min_sid: 5}}")
    with pytest.raises(ConfigError, match=r"min_sid.*'min_side'"):
        run_data_command("filter", tmp_path / "s", "--config", config)
    config.write_text("data: {train: []}")
    with pytest.raises(ConfigError, match=r"c.yaml has no filters"):
        run_data_command("filter", tmp_path / "s", "--config", config)
