"""Warnings while a run trains: a source that loses most samples, captions that are truncated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.config.presets import load_run
from pretrain.train.metrics import RankReport, SourceSize
from pretrain.train.skipped_samples import SkippedSampleMonitor

SOURCES = (SourceSize("web", 10_000), SourceSize("own", 500))
NOTHING = RankReport(
    wait_seconds=0,
    memory_gib=0,
    problems=(),
    filtered={},
    read=(0, 0),
    skipped=(0, 0),
    truncated=0,
)


@pytest.fixture
def monitor() -> SkippedSampleMonitor:
    return SkippedSampleMonitor(SOURCES, load_run("tiny", ["data.max_filtered_ratio=0.25"]))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return texts


def test_a_source_is_reported_once(
    monitor: SkippedSampleMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    two_ranks = [replace(NOTHING, read=(300, 100), skipped=(60, 100))] * 2
    monitor.add(two_ranks)
    assert not warnings(caplog)  # all of `own` was skipped, but that is only 200 samples
    for _ in range(3):
        monitor.add(two_ranks)
    assert not warnings(caplog)
    monitor.add(two_ranks)
    (text,) = warnings(caplog)
    assert text.startswith("source own: 1,000 of 1,000 samples") and "(0.25)" in text
    monitor.add(two_ranks)
    assert not warnings(caplog)

    monitor.add([replace(NOTHING, read=(1400, 0), skipped=(1400, 0))])
    (text,) = warnings(caplog)
    assert text.startswith("source web: 2,120 of 5,000 samples")


def test_truncated_captions(
    monitor: SkippedSampleMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    monitor.add([replace(NOTHING, read=(1000, 0), truncated=10)])
    assert not warnings(caplog)
    monitor.add([replace(NOTHING, read=(1000, 0), truncated=11)])
    (text,) = warnings(caplog)
    assert "21 of 2,000 captions" in text and "model.context_length (64)" in text
    monitor.add([replace(NOTHING, read=(1000, 0), truncated=500)])
    assert not warnings(caplog)


def test_every_source_has_its_own_warning(caplog: pytest.LogCaptureFixture) -> None:
    sources = (SourceSize("web: a", 9_000), SourceSize("web: b", 9_000), SourceSize("web: b", 1))
    monitor = SkippedSampleMonitor(sources, load_run("tiny"))
    for _ in range(2):
        monitor.add([replace(NOTHING, read=(5000,) * 3, skipped=(5000,) * 3)])
    texts = [text.partition(" of ")[0] for text in warnings(caplog)]
    assert texts == [f"source web: {name}: 5,000" for name in "abb"]
