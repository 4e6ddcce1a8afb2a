"""The GPU suite on the CPU: every part runs, a failing check is found and told, and time is
kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.moe import dispatch, statistics
from tests.support.launch import ROOT, clean_environment
from tools.bench_loader import workloads
from tools.bench_moe.limits import Limits
from tools.bench_moe.measure import Measured
from tools.bench_moe.shapes import Shape
from tools.benchmark import Quartiles
from tools.figures import Figure, skipped
from tools.gpu_suite import __main__ as command
from tools.gpu_suite import layers, numbers, runs, speed, synchronizations
from tools.gpu_suite.layers import OTHER_WAYS, WAYS
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import HEAD, Check, Report, at_most, figure_row

CPU = torch.device("cpu")


def options(scratch: Path) -> Options:
    return Options(device=torch.device("cpu"), deadline=time.monotonic() + 100, scratch=scratch)


def suite(*words: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_suite", *words],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# --- it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("suite") / "gpu.json"
    done = suite("--cpu", "--out", str(out))
    return done, json.loads(out.read_text())


def test_every_part_runs_and_passes(
    everything: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, found = everything
    assert done.returncode == 0 and found["failed"] == [], done.stdout + done.stderr
    assert list(found["parts"]) == list(command.PARTS) == list(found["seconds"])
    parts = found["parts"]
    assert all(part["checks"] and not part["skipped"] for part in parts.values())
    assert len(parts["layer"]["checks"]) == len(WAYS)
    assert len(parts["waits"]["checks"]) == len(WAYS) + len(OTHER_WAYS)
    assert {"loss contrastive", "gradient norm"} <= {
        c["name"].rpartition(": ")[2] for c in parts["step"]["checks"]
    }
    assert any("DeepSpeed" in line["name"] for line in parts["speed"]["figures"])
    for preset in ("tiny", "s16"):
        lines = {line["name"]: line for line in parts[preset]["figures"]}
        assert lines[f"{preset}: samples a second"]["value"]["median"] > 0
        assert lines[f"{preset}: model FLOPs utilization"]["note"]


def test_the_table_comes_last(
    everything: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, found = everything
    lines = done.stdout.rstrip().splitlines()
    first = lines.index(next(line for line in lines if line.startswith("| part")))
    assert all(line.startswith("| ") for line in lines[first:])
    results = sum(len(part["checks"]) + len(part["figures"]) for part in found["parts"].values())
    assert len(lines) - first == results + 2
    assert "the figures mean nothing" in done.stdout  # there was no GPU


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "layr"]) == 2
    assert "layr" in capsys.readouterr().err


# --- what is right passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_rounding_decides_nothing_at_the_size_of_a_gpu(way: str) -> None:
    exact, report = layers.build(way, numbers.GPU_SHAPE, CPU, torch.float32).run(), Report()
    numbers._check(report, way, CPU, torch.bfloat16, way, numbers.GPU_SHAPE, exact)
    assert report.checks[0].passed, report.checks[0]


# --- what is wrong is found ------------------------------------------------------------------------------------


def test_a_wrong_gradient_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch._WeightedSum.backward

    def wrong(ctx: Any, grad_TD: torch.Tensor) -> Any:
        rows, weights, nothing = right(ctx, grad_TD)
        return rows * (1.1 if grad_TD.dtype == torch.bfloat16 else 1.0), weights, nothing

    report = Report()
    monkeypatch.setattr(dispatch._WeightedSum, "backward", staticmethod(wrong))
    numbers.layer_numbers(options(tmp_path), report)
    assert report.checks and not any(check.passed for check in report.checks)


def test_a_step_that_is_a_little_off_passes_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(loss: float, norm: float, length: float) -> list[str]:
        facts = {
            "fp32": ({"caption": 2.0}, 3.0, 4.0),
            "bf16": ({"caption": 2 * loss}, 3 * norm, 4 * length),
        }
        monkeypatch.setattr(numbers, "_step", lambda device, precision: facts[precision])
        report = Report()
        numbers.step_numbers(options(tmp_path), report)
        return [check.name.rpartition(": ")[2] for check in report.checks if not check.passed]

    assert failed(1.01, 1.04, 0.96) == []
    assert failed(1.03, 1.06, 0.94) == ["loss caption", "gradient norm", "length of the update"]


def train_as(
    out: list[str], code: int | None, seconds: float, scratch: Path, patch: pytest.MonkeyPatch
) -> Report:
    """What the suite says of a run of `tiny` that leaves a journal and ends so; None: it is ended
    for its time."""

    def train(words: list[str], *, timeout: float, **given: Any) -> Any:
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in out))
        if code is None:
            raise subprocess.TimeoutExpired(words, timeout)
        return SimpleNamespace(returncode=code, stdout="", stderr="first\nthe reason")

    patch.setattr(
        workloads, "prepare", lambda workload, root: SimpleNamespace(folder=root, tokenizer=root)
    )
    patch.setattr(runs.subprocess, "run", train)
    report = Report()
    given = Options(device=CPU, deadline=time.monotonic() + seconds, scratch=scratch)
    runs.tiny_run(given, report)
    return report


@pytest.mark.parametrize(
    ("out", "code", "seconds", "passed"),
    [
        (['{"loss/total": 3.5}', '{"loss/total": 2.5}'], 0, 90, True),
        (['{"loss/total": 3.5}', '{"loss/total": 2.5}'], None, 20, True),  # ended for its time
        (['{"loss/total": 3.5}', '{"loss/total": 2.5}'], 1, 90, False),
        (['{"loss/total": 3.5}', '{"loss/total": NaN}'], 0, 90, False),
        ([], 0, 90, False),
        ([], None, 90, False),  # it hangs
    ],
)
def test_a_run_must_end_well_with_finite_losses(
    out: list[str],
    code: int | None,
    seconds: float,
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (check,) = train_as(out, code, seconds, tmp_path, monkeypatch).checks
    assert (check.name, check.passed) == ("tiny trains", passed)
    assert check.measured == (
        "loss 3.500 to " + ("nan" if "NaN" in out[1] else "2.500") if out else "no step"
    )
    if code:
        assert "the reason" in check.note


def test_a_run_without_time_for_a_step_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = train_as([], None, 20, tmp_path, monkeypatch)
    assert report.checks == [] and "no step in the 17 s that were left" in report.figures[0].note
    assert report.figures[0].name == "tiny trains" and report.figures[0].verdict() == "not measured"


def test_a_read_by_the_host_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = statistics._by_modality

    def reading(values: torch.Tensor, split: int) -> torch.Tensor:
        return right(values * float(values.sum() > 0), split)

    monkeypatch.setattr(statistics, "_by_modality", reading)
    report = Report()
    synchronizations.synchronizations(options(tmp_path), report)
    assert not any(check.passed for check in report.checks)
    assert "_local_scalar_dense" in report.checks[0].note


class FakeCuda:
    """Stands for CUDA's watch over waits: the layers whose turns are in `waiting` wait once they
    are set up."""

    def __init__(
        self, patch: pytest.MonkeyPatch, waiting: tuple[str, ...] = (), broken: tuple[str, ...] = ()
    ) -> None:
        self.mode, self.watched = "default", list[str]()
        self.waiting, self.broken = waiting, broken
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        patch.setattr(synchronizations, "build", self.build)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def build(self, way: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
        assert device.type == "cuda" and shape.tokens >= 4096

        def run() -> None:
            if way in self.broken:
                raise RuntimeError("no such kernel\nat all")
            if self.mode == "error":
                self.watched.append(way)
                if way in self.waiting:
                    raise RuntimeError("called a synchronizing CUDA operation\nmore words")

        return SimpleNamespace(
            layer=SimpleNamespace(experts=SimpleNamespace(backend="auto")), run=run
        )


def waits(scratch: Path) -> list[Check]:
    """What the part says of a GPU."""
    report = Report()
    given = Options(device=torch.device("cuda"), deadline=time.monotonic() + 100, scratch=scratch)
    synchronizations.synchronizations(given, report)
    return report.checks


def test_cuda_is_told_to_refuse_waits_of_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, waiting=("pools", "sampled"))
    checks = {check.name.removesuffix(": the host never waits"): check for check in waits(tmp_path)}
    assert cuda.watched == list(checks) == [*WAYS, *OTHER_WAYS] and cuda.mode == "default"
    assert [name for name, check in checks.items() if not check.passed] == ["pools", "sampled"]
    assert checks["pools"].note == "called a synchronizing CUDA operation"


def test_a_way_that_cannot_run_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, broken=("usual",))
    first, *others = waits(tmp_path)
    assert (first.name, first.passed, first.note) == ("usual: runs", False, "no such kernel")
    assert len(others) == len(WAYS) + len(OTHER_WAYS) - 1 and all(check.passed for check in others)
    assert "usual" not in cuda.watched


def test_the_other_ways_are_what_they_are_called() -> None:
    shape = numbers.SMALL_SHAPE
    built = {way: layers.build(way, shape, CPU, torch.float32) for way in OTHER_WAYS}
    built["sums of absolute weights"].run()
    plain = {name: value.clone() for name, value in built["sums of absolute weights"].run().items()}
    built["sums of absolute weights"].layer.balance = layers.BalanceConfig()
    without = built["sums of absolute weights"].run()
    changed = {name for name in plain if not torch.equal(plain[name], without[name])}
    assert changed == {"gate.weight", "experts.w1", "experts.w2", "experts.w3"}
    chosen = built["experts choose patches"]
    assert chosen.layer.route(chosen.x_TD, chosen.tokens)[2].token_N is not None
    config = {way: one.layer.config for way, one in built.items()}
    assert (
        config["sampled"].choice == "sampled"
        and config["capacity by sureness"].capacity_priority == "batch"
    )


def test_reads_are_operations_whose_answer_the_host_needs() -> None:
    x = torch.arange(6)
    with synchronizations.HostReads() as reads:
        x.cumsum(0), x.argsort(), x[torch.tensor([1, 2])], torch.where(x > 2, x, 0)
    assert reads.seen == []
    with synchronizations.HostReads() as reads:
        x[x > 2], x.nonzero(), x.sum().item()
    assert len(reads.seen) >= 3


def test_a_failed_check_gives_exit_1_and_a_part_that_is_not_installed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command._parse(["--cpu", "--out", str(tmp_path / "gpu.json")])
    left_out = Report(skipped="obstore is not installed")
    assert (
        command.tell(
            {"layer": Report(checks=[at_most("fine", 0.1, 1)]), "s16": left_out}, {}, given
        )
        == 0
    )
    assert "obstore is not installed" in capsys.readouterr().out
    assert command.tell({"layer": Report(checks=[at_most("not", float("nan"), 1)])}, {}, given) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["layer: not"]


# --- time is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "told"), [("time.sleep(60)", "did not end within"), ("sys.exit(3)", "status 3")]
)
def test_a_part_that_crashes_or_takes_too_long_fails_and_keeps_what_it_had(
    ending: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_scripted("layer", ending, tmp_path, monkeypatch, budget=1.0, whole=1.0)
    assert [check.name for check in report.checks] == ["one", "runs to its end"]
    assert not report.checks[1].passed and told in report.checks[1].note


@pytest.mark.parametrize(("name", "whole"), [("speed", 1.0), ("layer", 50.0)])
def test_figures_that_take_too_long_and_parts_that_had_less_time_do_not_fail(
    name: str, whole: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_scripted(name, "time.sleep(60)", tmp_path, monkeypatch, budget=1.0, whole=whole)
    assert [check.name for check in report.checks] == ["one"]
    (line,) = report.figures
    assert line.verdict() == "not measured" and line.note == "did not end within its 1 s"


def test_figures_that_crash_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_scripted("speed", "sys.exit(3)", tmp_path, monkeypatch, budget=1.0, whole=50.0)
    assert [check.passed for check in report.checks] == [True, False]


def run_scripted(
    name: str,
    ending: str,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    budget: float,
    whole: float,
) -> Report:
    """A part, usually of `whole` seconds, that leaves one check and then ends so."""
    path = scratch / f"{name}.json"
    script = (
        f"import sys, time; from pathlib import Path; from tools.gpu_suite.results import Check, Report; "
        f"Report(path=Path({str(path)!r})).add(Check(name='one', passed=True)); {ending}"
    )
    monkeypatch.setattr(command, "_command", lambda *given: [sys.executable, "-c", script])
    monkeypatch.setattr(command, "GRACE_SECONDS", 2.0)
    monkeypatch.setitem(command.PARTS, name, command.PARTS[name]._replace(seconds=whole))
    monkeypatch.chdir(ROOT)
    started = time.monotonic()
    report = command.run_part(name, budget, scratch, command._parse(["--cpu"]))
    assert time.monotonic() - started < 20
    return report


def test_without_time_left_parts_are_named(tmp_path: Path) -> None:
    done = suite("--cpu", "--seconds", "5", "--out", str(tmp_path / "gpu.json"), timeout=60)
    assert done.returncode == 0
    assert done.stdout.count("no time left") == len(command.PARTS)


def test_a_part_is_begun_while_half_of_its_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, float] = {}

    def run_part(name: str, budget: float, *given: Any) -> Report:
        begun[name] = budget
        return Report()

    monkeypatch.setattr(command, "run_part", run_part)
    out = tmp_path / "gpu.json"
    words = [
        "--cpu",
        "--seconds",
        "50",
        "--only",
        "layer",
        "--only",
        "s16",
        "--only",
        "tiny",
        "--out",
        str(out),
    ]
    assert command.main(words) == 0
    assert begun == pytest.approx({"layer": 50, "tiny": 50}, abs=5)
    assert "it may take 130 s" in json.loads(out.read_text())["parts"]["s16"]["skipped"]


def test_a_larger_shape_is_expected_to_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = Shape("small", 64, 32, 16, 8, 2), Shape("large", 256, 32, 16, 8, 2)
    measured: list[tuple[str, str]] = []

    class Clock:
        """Seconds pass only while something is measured."""

        now = 0.0
        device, on_gpu = torch.device("cuda"), True

        def left(self) -> float:
            return 35.0 - self.now

    clock = Clock()

    def measure(shape: Shape, *given: Any, **more: Any) -> list[Measured]:
        measured.append((shape.name, shape.load))
        clock.now += 10 * shape.flops / small.flops
        return [Measured(shape, missing={"other": "out of memory"})]

    monkeypatch.setattr(speed, "GPU_SHAPES", (small, large))
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "measure_limits", lambda *given, **more: Limits(1.0, 1.0))
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: clock.now))
    report = Report()
    given: Any = clock
    speed.layer_speed(given, report)
    assert measured == [
        ("small", "even"),
        ("small", "uneven"),
    ]  # 10 s each; the large one would take 40
    assert [
        line.name.partition(":")[0] for line in report.figures if "no time left" in line.note
    ] == ["large, even", "large, uneven"]
    assert report.checks == [] and "its 40 s or so" in report.figures[1].note


def test_budgets_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in command.PARTS.values()) <= command.TOTAL_SECONDS < 540


# --- results ---------------------------------------------------------------------------------------------------


def test_a_report_is_the_same_after_its_file(tmp_path: Path) -> None:
    report = Report(path=tmp_path / "part.json")
    report.add(
        Check(name="a", passed=True, note="b"),
        Figure(name="c", value=Quartiles(1, 2, 3), floor=1.5),
    )
    report.add(skipped("d", "no reason"))
    again = Report.from_json(json.loads((tmp_path / "part.json").read_text()))
    assert (again.checks, again.figures, again.skipped) == (report.checks, report.figures, "")
    rows = [check.row("x") for check in again.checks] + [
        figure_row("x", line) for line in again.figures
    ]
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows[1][3:5] == ["at least 1.50", "floor"] and rows[2][4:] == [
        "not measured",
        "no reason",
    ]


def test_the_journal_of_a_run_that_was_ended_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"perf/samples_per_second": speed, "perf/mfu": 0.3} for speed in (1.0, 2.0, 30.0, 40.0)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"perf/samples_per')
    lines = {line.name: line for line in runs.run_figures("s16", runs.read_rows(path))}
    speed = lines["s16: samples a second"].value
    assert speed is not None and speed.median == 35.0  # without the start
    share = lines["s16: model FLOPs utilization"].value
    assert share is not None and share.median == pytest.approx(30)
    assert lines["s16: memory"].value is None
    assert runs.read_rows(tmp_path / "none.jsonl") == []
