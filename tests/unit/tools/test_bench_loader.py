"""The loader benchmark: its report, its equality checks and its data. Speed is not tested."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.support.launch import ROOT
from tools.bench_loader import __main__ as command
from tools.bench_loader import mosaicml_peer, peers, throughput
from tools.bench_loader.equality import Sample, check_equal
from tools.bench_loader.soak import Snapshot, Soak
from tools.bench_loader.synthetic_images import caption, jpeg
from tools.bench_loader.workloads import CROPPED, SMALL, prepare


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Printed output and JSON report of a quick run."""
    out = tmp_path_factory.mktemp("bench") / "report.json"
    selection = [option for name in ("loader", "raw", "seek") for option in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_loader", "--quick", *selection, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_report_contents(report: tuple[str, dict[str, Any]]) -> None:
    _, contents = report
    assert list(contents["benchmarks"]) == ["loader", "raw", "seek"]
    assert contents["quick"] is True and contents["repeats"] == 2
    assert contents["machine"]["cores"] >= 1 and contents["machine"]["webdataset"] == "1.0.2"

    rows = {row["name"]: row for rows in contents["benchmarks"].values() for row in rows}
    for workload in ("small", "web-augmented"):
        for peer in ("webdataset", "webdataset shuffled", throughput.DECODE_ONLY):
            assert rows[f"{workload}: ours / {peer}"]["unit"] == "x"
    # Pillow has no equivalent augmentation.
    assert "web-augmented: ours / webdataset and Pillow" not in rows

    measured = [row for row in rows.values() if row["value"] is not None]
    assert len(measured) > 20
    for row in measured:
        value = row["value"]
        assert 0 < value["low"] <= value["median"] <= value["high"], row
        assert row["verdict"] in ("", "goal", "floor", "MISSED")
    for row in rows.values():
        assert row["value"] is not None or row["note"], "not measured, but without a reason"


def test_table_has_a_row_for_every_measurement(report: tuple[str, dict[str, Any]]) -> None:
    printed, contents = report
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    benchmarks = contents["benchmarks"]
    assert len(lines) == sum(map(len, benchmarks.values())) + 2 * len(benchmarks)
    for rows in benchmarks.values():
        assert all(any(f"| {row['name']} " in line for line in lines) for row in rows)


def test_unknown_benchmark_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "lodaer"]) == 2
    assert "lodaer" in capsys.readouterr().err


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(peers.Unavailable, match="mosaicml-streaming is not installed"):
        mosaicml_peer.mosaicml(prepare(SMALL.quick(), tmp_path), SMALL.quick())


def test_different_samples_are_rejected() -> None:
    expected = {"a": Sample(b"\x10" * 12, [1, 5, 2]), "b": Sample(b"\x20" * 12, [1, 6, 2])}
    check_equal("peer", expected, expected, SMALL)
    for wrong in (
        {"a": expected["a"]},
        expected | {"b": Sample(b"\x20" * 11 + b"\x21", [1, 6, 2])},
        expected | {"b": Sample(b"\x20" * 12, [1, 7, 2])},
    ):
        with pytest.raises(AssertionError, match="peer"):
            check_equal("peer", wrong, expected, SMALL)


def test_tolerance_for_another_decoder_and_for_augmentation() -> None:
    expected = {"a": Sample(b"\x40" * 12, [1, 2])}
    near = {"a": Sample(b"\x43" * 12, [1, 2])}
    far = {"a": Sample(b"\x50" * 12, [1, 2])}
    check_equal("wds and Pillow", near, expected, SMALL)
    with pytest.raises(AssertionError, match="differs by 16"):
        check_equal("wds and Pillow", far, expected, SMALL)
    check_equal("peer", far, expected, CROPPED)


def test_data_is_deterministic_and_written_once(tmp_path: Path) -> None:
    workload = SMALL.quick()
    first, second = prepare(workload, tmp_path / "a"), prepare(workload, tmp_path / "b")
    assert len(first.shards()) == workload.shards
    for a, b in zip(first.shards(), second.shards(), strict=True):
        assert Path(a).read_bytes() == Path(b).read_bytes()

    modified = Path(first.shards()[0]).stat().st_mtime_ns
    prepare(workload, tmp_path / "a")
    assert Path(first.shards()[0]).stat().st_mtime_ns == modified


@pytest.mark.parametrize(
    ("width", "height", "quality", "low", "high"),
    [(80, 80, 85, 1500, 4500), (256, 256, 90, 14_000, 28_000)],
)
def test_file_sizes_are_those_of_photographs(
    width: int, height: int, quality: int, low: int, high: int
) -> None:
    files = [jpeg(seed, width, height, quality=quality, grain=4.0) for seed in range(4)]
    assert low < statistics.mean(map(len, files)) < high
    assert len(set(files)) == 4
    pixels = cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (height, width, 3)
    assert len({caption(seed) for seed in range(100)}) == 100


def test_growth_is_the_slope_after_the_warmup() -> None:
    snapshots = [
        # 50 MiB in the warm-up, then 3 MiB per 100,000 samples; one file per 20,000 samples.
        Snapshot(
            samples=n,
            resident=int((100 + min(50, n / 4000) + 3 * n / 1e5) * 2**20),
            files=10 + n // 20_000,
            threads=4,
            shm_mappings=5 + n // 1000 % 2,
        )
        for n in range(0, 1_000_001, 20_000)
    ]
    constant = [snapshot._replace(resident=1 << 28, files=3) for snapshot in snapshots]
    soak = Soak(
        snapshots={1: snapshots, 2: constant},
        samples=1_000_000,
        problems=0,
        seconds=1.0,
        leaked_shm=(),
    )
    assert soak.growth_per_100k(1, "resident") / 2**20 == pytest.approx(3.0, abs=0.01)
    assert soak.max_growth("files") == pytest.approx(5.0, abs=0.01)
    assert soak.growth_per_100k(2, "resident") == pytest.approx(0.0, abs=1e-6)
    assert abs(soak.max_growth("threads")) < 1e-6 and abs(soak.max_growth("shm_mappings")) < 0.01
