from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.harmless import harmless
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.page import bars, histogram
from data_pipeline.preparing.scripts import script_of
from data_pipeline.preparing.stats import measure
from data_pipeline.preparing.tables import bytes_text, shortened, table
from data_pipeline.preparing.visit import draw
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data
from tests.support.small_shards import make_shards, make_tokenizer, picture


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


def test_figures_are_those_of_the_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        _sample("a", 40, 20, txt="a red fox", json={"more": ["one", "two"]}),
        _sample("b", 10, 30, txt="A  red fox"),
        _sample("c", 40, 20, txt="猫", json={"more": "x"}),
        {"__key__": "d", "png": picture(4), "txt": "a dog"},
        {"__key__": "e", "png": b"no", "txt": "x"},
        {"__key__": "f", "txt": "x"},
    ]
    write_shards(samples, tmp_path / "s", samples_per_shard=4)
    model = make_tokenizer(tmp_path)
    data(
        "stats",
        tmp_path / "s",
        "--caption-key",
        "txt",
        "--caption-key",
        "json:more",
        "--tokenizer",
        model,
        "--json",
        tmp_path / "s.json",
        "--html",
        tmp_path / "s.html",
        "--workers",
        0,
    )
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["samples"], found["shards"], found["looked_at"]) == (6, 2, 6)
    assert found["formats"] == {"jpg": 3, "png": 1}
    assert found["scripts"] == {"Latin": 6, "Han": 1}
    assert found["repeats"] == {"equal picture files": 1, "equal first captions": 1}
    assert found["bad"] == {"bad-image": 1, "no-image": 1}
    quantities = found["quantities"]
    assert (quantities["picture width"]["min"], quantities["picture width"]["max"]) == (10, 40)
    assert quantities["shorter side"]["mean"] == (20 + 10 + 20 + 12) / 4
    assert quantities["width / height"]["max"] == 2
    assert quantities["captions in json:more"]["mean"] == 3 / 4
    texts = ["a red fox", "one", "two", "A red fox", "猫", "x", "a dog"]
    assert quantities["caption characters"]["mean"] == round(sum(map(len, texts)) / 7, 4)
    lengths = [len(Tokenizer.load(model).encode(text, 999)) for text in texts]
    assert quantities["caption tokens"]["median"] == np.median(lengths)
    said = capsys.readouterr().out
    assert "looked at all 6 samples" in said and "not readable" in said
    page = (tmp_path / "s.html").read_text()
    assert (
        page.count("data:image/jpeg;base64,") == 4
        and page.count("<svg") == 9
        and "<script" not in page
    )


def test_of_large_sets_some_are_drawn_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_shards(tmp_path, count=40)
    tasks = draw([manifest], 15, seed=1)
    drawn = [(task.shard, number) for task in tasks for number in task.samples or ()]
    assert len(set(drawn)) == 15 and drawn == sorted(drawn)
    assert all(0 <= number < manifest.shards[shard].samples for shard, number in drawn)
    assert draw([manifest], 15, seed=1) == tasks != draw([manifest], 15, seed=2)
    hits = np.zeros(40)
    for seed in range(400):
        for task in draw([manifest], 10, seed):
            hits[[7 * task.shard + number for number in task.samples or ()]] += 1
    assert (
        hits.sum() == 4000 and hits.min() > 60 and hits.max() < 145
    )  # 100 each, give or take four sigma
    assert [task.samples for task in draw([manifest], 40, 1)] == [None] * 6
    data("stats", tmp_path, "--samples", 15, "--workers", 0)
    assert "looked at 15 of 40 samples, drawn with --seed 0" in capsys.readouterr().out


def test_missing_shards_are_named_and_not_counted(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=14)
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    stats = measure([manifest], samples=0)
    assert stats.looked_at == 7 and not stats.bad and len(stats.widths) == 7
    assert [(row.task.shard, row.reason) for row in stats.unread] == [(1, "missing-shard")]
    assert measure([manifest], samples=0, workers=2).to_json(["txt"]) == stats.to_json(["txt"])


def test_histograms_count_everything() -> None:
    for values in (
        np.array([5]),
        np.array([1, 1, 2, 900]),
        np.random.default_rng(0).normal(size=1000),
    ):
        edges, counts = bars(values, 30)
        assert counts.sum() == len(values) and len(edges) == len(counts) + 1
        assert histogram("x", values).count("<rect") == len(counts)
    assert histogram("x", np.array([])) == ""


def test_tables_and_text_for_terminals() -> None:
    assert table(["name", "count"], [("a", 1234), ("long name", 5)]).splitlines() == [
        "name       count",
        "---------  -----",
        "a          1,234",
        "long name      5",
    ]
    assert (
        bytes_text(5) == "5 B"
        and bytes_text(1536) == "1.5 KiB"
        and bytes_text(3 << 50) == "3072.0 TiB"
    )
    assert harmless("a\x1b[2Jb\u202ec\td\ud800") == r"a\x1b[2Jb\u202ec\td\ud800"
    assert harmless("日本 é\n") == "日本 é\\n" and harmless("a\nb", lines=True) == "a\nb"
    assert shortened("abcdef", 3) == "abc … (3 more characters)" and shortened("abc", 3) == "abc"
