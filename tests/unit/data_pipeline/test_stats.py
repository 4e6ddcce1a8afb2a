from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.html_report import histogram, histogram_bins
from data_pipeline.preparing.stats import compute_stats
from data_pipeline.preparing.tasks import sample_tasks
from data_pipeline.preparing.unicode_scripts import script_of
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_png, make_shards, make_tokenizer


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a red fox", "Latin"),
        ("Žluťoučký kůň 123", "Latin"),
        ("собака dog собака", "Cyrillic"),
        ("一只猫", "Han"),
        ("これは猫です", "Japanese"),
        ("東京タワー", "Japanese"),
        ("고양이", "Hangul"),
        ("قطة", "Arabic"),
        ("חתול", "Hebrew"),
        ("बिल्ली", "Devanagari"),
        ("แมว", "Thai"),
        ("γάτα", "Greek"),
        ("123 !? 🐈", "none"),
        ("", "none"),
        ("ＡＢＣ", "Latin"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def _sample(key: str, width: int, height: int, **members: object) -> dict[str, object]:
    pixels = np.full((height, width, 3), len(key), np.uint8)
    return {"__key__": key, "jpg": bytes(cv2.imencode(".jpg", pixels)[1]), **members}


def _write_mixed_samples(folder: Path) -> None:
    samples = [
        _sample("a", 40, 20, txt="a red fox", json={"more": ["one", "two"]}),
        _sample("b", 10, 30, txt="A  red fox"),
        _sample("c", 40, 20, txt="猫", json={"more": "x"}),
        {"__key__": "d", "png": make_png(4), "txt": "a dog"},
        {"__key__": "e", "png": b"no", "txt": "x"},
        {"__key__": "f", "txt": "x"},
    ]
    write_shards(samples, folder, samples_per_shard=4)


def test_command_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_mixed_samples(tmp_path / "s")
    model = make_tokenizer(tmp_path)
    options = ("--caption-key", "txt", "--caption-key", "json:more", "--tokenizer", model)
    files = ("--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    run_data_command("stats", tmp_path / "s", *options, *files, "--workers", 0)

    content = json.loads((tmp_path / "s.json").read_text())
    assert (content["samples"], content["shards"], content["measured_samples"]) == (6, 2, 6)
    assert content["formats"] == {"jpg": 3, "png": 1}
    assert content["scripts"] == {"Latin": 6, "Han": 1}
    assert content["duplicates"] == {"equal image files": 1, "equal first captions": 1}
    assert content["corrupt"] == {"corrupt-image": 1, "no-image": 1}

    quantities = content["quantities"]
    assert (quantities["image width"]["min"], quantities["image width"]["max"]) == (10, 40)
    assert quantities["shorter side"]["mean"] == (20 + 10 + 20 + 12) / 4
    assert quantities["width / height"]["max"] == 2
    assert quantities["captions in json:more"]["mean"] == 3 / 4
    texts = ["a red fox", "one", "two", "A red fox", "猫", "x", "a dog"]
    assert quantities["caption characters"]["mean"] == round(sum(map(len, texts)) / 7, 4)
    lengths = [len(Tokenizer.load(model).encode(text, 999)) for text in texts]
    assert quantities["caption tokens"]["median"] == np.median(lengths)

    output = capsys.readouterr().out
    assert "measured all 6 samples" in output and "unreadable" in output
    page = (tmp_path / "s.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert page.count("<svg") == 9
    assert "<script" not in page


def test_random_subset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_shards(tmp_path, count=40)
    tasks = sample_tasks([manifest], 15, seed=1)
    chosen = [(task.shard, sample) for task in tasks for sample in task.samples or ()]
    assert len(set(chosen)) == 15 and chosen == sorted(chosen)
    assert all(0 <= sample < manifest.shards[shard].samples for shard, sample in chosen)
    assert sample_tasks([manifest], 15, seed=1) == tasks
    assert sample_tasks([manifest], 15, seed=2) != tasks
    assert [task.samples for task in sample_tasks([manifest], 40, 1)] == [None] * 6

    run_data_command("stats", tmp_path, "--samples", 15, "--workers", 0)
    output = capsys.readouterr().out
    assert "measured 15 of 40 samples" in output and "--seed 0" in output


def test_random_subset_is_uniform(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=40)
    counts = np.zeros(40)
    for seed in range(400):
        for task in sample_tasks([manifest], 10, seed):
            counts[[7 * task.shard + sample for sample in task.samples or ()]] += 1

    # The expected count is 100; the bounds are about four standard deviations.
    assert counts.sum() == 4000 and counts.min() > 60 and counts.max() < 145


def test_missing_shards_are_listed_and_not_counted(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=14)
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    stats = compute_stats([manifest], samples=0)
    assert stats.num_samples == 7 and not stats.corrupt and len(stats.widths) == 7
    assert [(row.task.shard, row.reason) for row in stats.unavailable] == [(1, "missing-shard")]
    with_workers = compute_stats([manifest], samples=0, workers=2)
    assert with_workers.to_json(["txt"]) == stats.to_json(["txt"])


def test_histogram_counts_all_values() -> None:
    for values in (
        np.array([5]),
        np.array([1, 1, 2, 900]),
        np.random.default_rng(0).normal(size=1000),
    ):
        edges, counts = histogram_bins(values, 30)
        assert counts.sum() == len(values) and len(edges) == len(counts) + 1
        assert histogram("x", values).count("<rect") == len(counts)
    assert histogram("x", np.array([])) == ""
