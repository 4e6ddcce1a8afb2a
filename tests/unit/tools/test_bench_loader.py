"""The loader's benchmark: its arithmetic, its checks, and that it runs; never how fast anything
is."""

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
from tools import benchmark
from tools.bench_loader import __main__ as command
from tools.bench_loader import loading, peers
from tools.bench_loader.figures import HEAD, Figure, skipped
from tools.bench_loader.pictures import caption, jpeg
from tools.bench_loader.soak import Look, Soak
from tools.bench_loader.workloads import CROPPED, SMALL, prepare
from tools.benchmark import Clock, Quartiles

# --- it runs, and what it says has the form that it promises ---------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "report.json"
    names = [word for name in ("loader", "raw", "seek") for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_loader", "--quick", *names, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_report_says_what_was_measured_and_where(report: tuple[str, dict[str, Any]]) -> None:
    _, found = report
    assert list(found["measures"]) == ["loader", "raw", "seek"]
    assert found["quick"] is True and found["repeats"] == 2
    assert found["machine"]["cores"] >= 1 and found["machine"]["webdataset"] == "1.0.2"
    figures = {figure["name"]: figure for rows in found["measures"].values() for figure in rows}
    for workload in ("small", "web-augmented"):
        for peer in ("webdataset", "webdataset shuffled", loading.CEILING):
            assert figures[f"{workload}: ours / {peer}"]["unit"] == "x"
    assert (
        "web-augmented: ours / webdataset and Pillow" not in figures
    )  # it could not be the same picture
    measured = [figure for figure in figures.values() if figure["value"] is not None]
    assert len(measured) > 20
    for figure in measured:
        value = figure["value"]
        assert 0 < value["low"] <= value["median"] <= value["high"], figure
        assert figure["verdict"] in ("", "goal", "floor", "MISSED")
    for figure in figures.values():
        assert figure["value"] is not None or figure["note"], "left out without a reason"


def test_the_table_has_a_row_for_every_figure(report: tuple[str, dict[str, Any]]) -> None:
    printed, found = report
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    heads, rules = len(found["measures"]), len(found["measures"])
    assert len(rows) == sum(map(len, found["measures"].values())) + heads + rules
    for figures in found["measures"].values():
        assert all(any(f"| {figure['name']} " in row for row in rows) for figure in figures)


def test_an_unknown_measure_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "lodaer"]) == 2
    assert "lodaer" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(peers.Missing, match="mosaicml-streaming is not installed"):
        peers.mosaicml(prepare(SMALL.quick(), tmp_path), SMALL.quick())


# --- outputs are compared before anything is timed ------------------------------------------------------------


def test_a_peer_with_other_pixels_ids_or_samples_is_not_timed() -> None:
    expected = {"a": (b"\x10" * 12, [1, 5, 2]), "b": (b"\x20" * 12, [1, 6, 2])}
    loading._check_equal("peer", expected, expected, SMALL)
    for wrong in (
        {"a": expected["a"]},
        expected | {"b": (b"\x20" * 11 + b"\x21", [1, 6, 2])},
        expected | {"b": (b"\x20" * 12, [1, 7, 2])},
    ):
        with pytest.raises(AssertionError, match="peer"):
            loading._check_equal("peer", wrong, expected, SMALL)


def test_another_decoder_may_differ_a_little_and_augmented_pictures_at_will() -> None:
    expected = {"a": (b"\x40" * 12, [1, 2])}
    near, far = {"a": (b"\x43" * 12, [1, 2])}, {"a": (b"\x50" * 12, [1, 2])}
    loading._check_equal("wds and Pillow", near, expected, SMALL)
    with pytest.raises(AssertionError, match="differs by 16"):
        loading._check_equal("wds and Pillow", far, expected, SMALL)
    loading._check_equal("peer", far, expected, CROPPED)


def test_data_are_the_same_every_time_and_written_once(tmp_path: Path) -> None:
    quick = SMALL.quick()
    first, again = prepare(quick, tmp_path / "a"), prepare(quick, tmp_path / "b")
    assert len(first.shards()) == quick.shards
    for one, other in zip(first.shards(), again.shards(), strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    changed = Path(first.shards()[0]).stat().st_mtime_ns
    prepare(quick, tmp_path / "a")
    assert Path(first.shards()[0]).stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("width", "height", "quality", "low", "high"),
    [(80, 80, 85, 1500, 4500), (256, 256, 90, 14_000, 28_000)],
)
def test_pictures_have_the_file_sizes_of_photographs(
    width: int, height: int, quality: int, low: int, high: int
) -> None:
    files = [jpeg(seed, width, height, quality=quality, grain=4.0) for seed in range(4)]
    assert low < statistics.mean(map(len, files)) < high
    assert len(set(files)) == 4
    assert cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_COLOR).shape == (
        height,
        width,
        3,
    )
    assert len({caption(seed) for seed in range(100)}) == 100


# --- arithmetic of honest timing -------------------------------------------------------------------------------


def test_contestants_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    clock = Clock(lambda: float(len(calls)), 0.0001, 0.001)
    taken = benchmark.interleave(contestants, repeats=4, warmup=2, clock=clock)
    assert "".join(calls) == "abba" * 3
    assert taken == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_work_that_goes_on_in_the_background_is_counted() -> None:
    readings = iter(
        [0.0, 0.0, 5.0, 6.0, 7.0, 7.0]
    )  # at rest, then work, then two looks until it rests again
    clock = Clock(lambda: next(readings), 0.001, 0.001)
    assert benchmark.cpu_seconds(lambda: None, clock) == 7.0


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine was twice as slow in the second round: the ratio is 3 all the same.
    assert benchmark.ratio([3.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == Quartiles(3.0, 3.0, 3.0)
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert list(Quartiles.of(values)) == statistics.quantiles(values, n=4, method="inclusive")


def test_the_family_clock_counts_children_that_live_and_that_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    before = benchmark.family_cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    ended = benchmark.family_cpu_seconds()
    assert ended - before >= 0.25
    with subprocess.Popen(
        [sys.executable, "-c", burn + "print(1, flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in benchmark.family()
        assert benchmark.family_cpu_seconds() - ended >= 0.25
        child.communicate(b"\n")
    assert child.pid not in benchmark.family()


@pytest.mark.parametrize(
    ("median", "less", "verdict"),
    [
        (2.5, False, "goal"),
        (1.5, False, "floor"),
        (1.0, False, "MISSED"),
        (0.5, True, "goal"),
        (3.0, True, "MISSED"),
    ],
)
def test_verdicts_look_in_the_right_direction(median: float, less: bool, verdict: str) -> None:
    floor, goal = (2.0, 1.0) if less else (1.3, 2.0)
    made = Figure(
        name="x",
        value=Quartiles(median, median, median),
        floor=floor,
        goal=goal,
        less_is_better=less,
    )
    assert made.verdict() == verdict
    assert verdict in made.row()


def test_what_is_skipped_is_no_pass_and_keeps_its_reason() -> None:
    made = skipped("ours / peer", "not installed")
    assert made.verdict() == "not measured"
    assert made.to_json()["value"] is None
    assert made.row()[-1] == "not installed" and len(made.row()) == len(HEAD)


def test_a_table_lines_up() -> None:
    lines = benchmark.table([["a", "10"], ["long name", "1"]], ["name", "n"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.count("|") for line in lines] == [3] * 4


def test_a_report_replaces_the_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    for value in (1, 2):
        benchmark.write_json(path, {"value": value})
    assert json.loads(path.read_text()) == {"value": 2}
    assert list(path.parent.iterdir()) == [path]


# --- the soak's arithmetic -----------------------------------------------------------------------------------


def test_growth_is_the_slope_after_the_warm_up() -> None:
    looks = [
        # 50 MiB in the warm-up, then 3 MiB for 100,000 samples; one file more for 20,000.
        Look(
            samples=n,
            resident=int((100 + min(50, n / 4000) + 3 * n / 1e5) * 2**20),
            files=10 + n // 20_000,
            threads=4,
            shared=5 + n // 1000 % 2,
        )
        for n in range(0, 1_000_001, 20_000)
    ]
    flat = [look._replace(resident=1 << 28, files=3) for look in looks]
    soak = Soak(
        looks={1: looks, 2: flat}, samples=1_000_000, problems=0, seconds=1.0, left_in_shm=()
    )
    assert soak.per_100k(1, "resident") / 2**20 == pytest.approx(3.0, abs=0.01)
    assert soak.steepest("files") == pytest.approx(5.0, abs=0.01)
    assert soak.per_100k(2, "resident") == pytest.approx(0.0, abs=1e-6)
    assert abs(soak.steepest("threads")) < 1e-6 and abs(soak.steepest("shared")) < 0.01
