"""The MoE layer's benchmark: its checks, its arithmetic, and that it runs; never how fast anything
is."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.moe.layer import MoELayer
from tests.support.launch import ROOT, clean_environment
from tools import benchmark
from tools.bench_moe import __main__ as command
from tools.bench_moe import limits
from tools.bench_moe.agreement import differences, off, plain_layer
from tools.bench_moe.arms import Arm, Missing, Weights, dense, draw_tokens, draw_weights, ours
from tools.bench_moe.deepspeed_layers import auto_ep, native
from tools.bench_moe.limits import Limits, geometric_mean, peak_tensor_bytes
from tools.bench_moe.measure import (
    AUTO_EP,
    DEEPSPEED,
    DENSE,
    OURS,
    TORCHTITAN,
    Measured,
    figures,
    mean_figures,
    measure,
    measure_shape,
)
from tools.bench_moe.shapes import (
    CPU_SHAPES,
    EVEN,
    GPU_SHAPES,
    LOADS,
    QUICK_SHAPES,
    UNEVEN,
    Bounds,
    Shape,
)
from tools.bench_moe.torchtitan_layer import torchtitan

CPU, SHAPE = torch.device("cpu"), QUICK_SHAPES[1]

# --- it runs, and what it says has the form that it promises ---------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "moe.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_moe", "--quick", "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_report_has_every_arm_of_every_shape(report: tuple[str, dict[str, Any]]) -> None:
    printed, found = report
    assert found["quick"] and found["repeats"] == 2 and found["machine"]["threads"] == 1
    assert found["limits"]["flops_per_second"] > 0 and found["limits"]["bytes_per_second"] > 0
    lines = {line["name"]: line for line in found["figures"]}
    for label in (f"{shape.name}, {load}" for shape in QUICK_SHAPES for load in LOADS):
        for arm in (OURS, DEEPSPEED, AUTO_EP, DENSE):
            assert lines[f"{label}: {arm}"]["value"]["median"] > 0
        assert lines[f"{label}: speed against {DEEPSPEED}"]["unit"] == "x"
        assert lines[f"{label}: time against {DENSE}"]["less_is_better"]
        left_out = lines[f"{label}: {TORCHTITAN}"]
        assert left_out["value"] is None and "bfloat16" in left_out["note"]
    for measured in found["measured"]:
        assert not measured["wrong"]
        assert all(len(seconds) == 2 for seconds in measured["seconds"].values())
        assert all(value < 1e-5 for off in measured["off"].values() for value in off.values())
        assert set(measured["off"][OURS]) == {
            "answers",
            "gradient of the tokens",
            "gradient of router",
            "gradient of w1",
            "gradient of w2",
            "gradient of w3",
        }
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == len(found["figures"]) + 2
    assert [(m["shape"], m["load"]) for m in found["measured"]] == [
        (shape.name, load) for load in LOADS for shape in QUICK_SHAPES
    ]


def test_an_unknown_shape_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--device", "cpu", "--only", "mnay"]) == 2
    assert "mnay" in capsys.readouterr().err


@pytest.mark.parametrize("repeats", ["-1", "0"])
def test_no_rounds_are_refused(repeats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--device", "cpu", "--repeats", repeats]) == 2
    assert f"error: --repeats is {repeats}, but must be at least 1" in capsys.readouterr().err


# --- wrong answers are not timed -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [ours, native, auto_ep])
@pytest.mark.parametrize("shape", [QUICK_SHAPES[0], QUICK_SHAPES[1]._replace(load=UNEVEN)])
def test_every_arm_gives_the_plain_layers_answers(build: Any, shape: Shape) -> None:
    weights = draw_weights(shape, CPU, torch.float32)
    x_TD, grad_TD = draw_tokens(shape, weights)
    truth = plain_layer(x_TD, grad_TD, weights, shape.k)
    found = differences(build(shape, weights), x_TD, grad_TD, truth)
    assert len(found) == 6 and max(found.values()) < 1e-5


@pytest.mark.parametrize(("load_name", "least", "most"), [(EVEN, 1.0, 1.3), (UNEVEN, 1.6, 2.2)])
def test_rounding_never_decides_who_is_chosen(load_name: str, least: float, most: float) -> None:
    for shape in (CPU_SHAPES[0]._replace(load=load_name), CPU_SHAPES[2]._replace(load=load_name)):
        weights = draw_weights(shape, CPU, torch.float32)
        x_TD, _ = draw_tokens(shape, weights)
        logits, _ = torch.nn.functional.linear(x_TD, weights.router).sort(dim=1, descending=True)
        assert float((logits[:, shape.k - 1] - logits[:, shape.k]).detach().min()) > 0.1
        chosen = (
            torch.nn.functional.linear(x_TD, weights.router).topk(shape.k, dim=1).indices.flatten()
        )
        load = torch.bincount(chosen, minlength=shape.experts).double()
        assert least < float(load.max() / load.mean()) < most
        assert (float(load[-1] / load.mean()) < 0.3) == (load_name == UNEVEN)


@pytest.mark.parametrize("which", ["w2", "router"])
def test_an_arm_with_other_weights_is_named_and_left_out(which: str) -> None:
    def spoiled(shape: Shape, weights: Weights) -> Arm:
        return ours(shape, weights._replace(**{which: getattr(weights, which) * 1.01}))

    def gone(shape: Shape, weights: Weights) -> Arm:
        raise Missing("not on this planet")

    def crashing(shape: Shape, weights: Weights) -> Arm:
        return ours(shape, weights._replace(w1=weights.w1[:, :2]))

    peers = {"spoiled": spoiled, "gone": gone, "crashing": crashing}
    found = measure_shape(SHAPE, CPU, torch.float32, repeats=2, peers=peers)
    assert found.wrong == ["spoiled"] and set(found.seconds) == {OURS, DENSE}
    assert (
        "another answer" in found.missing["spoiled"]
        and found.missing["gone"] == "not on this planet"
    )
    assert found.missing["crashing"].startswith("RuntimeError: ")
    lines = {
        line.name: line for line in figures(found, Limits(1e9, 1e9), torch.float32, on_gpu=False)
    }
    assert lines[f"{SHAPE.label}: gone"].verdict() == "not measured"


def test_differences_are_relative_and_nothing_hides_in_no_number() -> None:
    true = torch.tensor([3.0, 4.0])
    assert off(true.clone(), true) == 0
    assert off(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.1)
    assert off(torch.tensor([3.0, float("nan")]), true) == float("inf")
    assert off(torch.tensor([3.0]), true) == float("inf")


def test_torchtitan_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Missing, match="always compute in bfloat16"):
        torchtitan(SHAPE, draw_weights(SHAPE, CPU, torch.float32))
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(Missing, match="cannot be imported"):
        torchtitan(SHAPE, draw_weights(SHAPE, CPU, torch.bfloat16))


# --- layers that need too much memory --------------------------------------------------------------------------

LARGE = Shape("large", 8192, 16, 8, 4, 2, Bounds(1.2, 1.4), Bounds(1.3, 1.1))


class Hungry:
    """Our layer, out of memory with more tokens than `most`: when it is built, or in its n-th
    run."""

    def __init__(self, most: int, fails_at: int) -> None:
        self.most, self.fails_at = most, fails_at
        self.tried: list[int] = []
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, shape: Shape, weights: Weights) -> Arm:
        self.tried.append(shape.tokens)
        arm = ours(shape, weights)
        if shape.tokens <= self.most:
            return arm
        self.held += [weakref.ref(parameter) for parameter in arm.module.parameters()]
        runs = 0

        def forward(x_TD: torch.Tensor) -> torch.Tensor:
            nonlocal runs
            runs += 1
            masks = x_TD * 2
            self.held.append(weakref.ref(masks))
            cycle: list[Any] = [masks]
            cycle.append(cycle)
            if runs == self.fails_at:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 90.00 GiB.\nMore words."
                )
            return arm.forward(x_TD)

        if not self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Arm(arm.module, forward, arm.gradients)


def measure_hungry(hungry: Hungry, monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """Measure beside a modest peer; each time the cache is emptied, nothing may be left of who
    wanted too much."""
    left: list[int] = []

    def count_what_is_left() -> None:
        left.append(sum(ref() is not None for ref in hungry.held))

    monkeypatch.setattr(torch.cuda, "empty_cache", count_what_is_left)
    gc.collect()
    gc.disable()  # what is collected, the benchmark collects itself
    try:
        peers: dict[str, Callable[[Shape, Weights], Arm]] = {DEEPSPEED: hungry, AUTO_EP: ours}
        found = measure(LARGE, CPU, torch.float32, repeats=2, peers=peers)
    finally:
        gc.enable()
    assert left == [0] * sum(tokens > hungry.most for tokens in hungry.tried)
    return found


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_who_runs_out_of_memory_is_measured_with_fewer_tokens(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(3000, fails_at)
    whole, smaller = measure_hungry(hungry, monkeypatch)
    assert hungry.tried == [8192, 4096, 2048]
    assert set(whole.seconds) == {OURS, AUTO_EP, DENSE} and set(smaller.seconds) == {
        OURS,
        DEEPSPEED,
        DENSE,
    }
    assert whole.missing == {DEEPSPEED: "out of memory; with 2,048 tokens: measured"}
    assert (whole.shape, smaller.shape.tokens, smaller.missing) == (LARGE, 2048, {})
    lines = {
        line.name: line
        for each in (whole, smaller)
        for line in figures(each, Limits(1e9, 1e9), torch.float32, on_gpu=False)
    }
    speed = lines[f"large, even, 2,048 tokens: speed against {DEEPSPEED}"]
    time = lines[f"large, even, 2,048 tokens: time against {DENSE}"]
    assert (speed.floor, speed.goal, time.floor, time.goal) == (1.2, 1.4, 1.3, 1.1)
    assert speed.note == time.note == "not 8,192 tokens: a layer runs out of memory"
    assert (
        f"large, even: speed against {DEEPSPEED}" not in lines
        and lines[f"large, even: {OURS}"].value is not None
    )
    assert lines[f"large, even: {DEEPSPEED}"].verdict() == "not measured"


def test_who_always_runs_out_of_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hungry = Hungry(0, 1)
    (whole,) = measure_hungry(hungry, monkeypatch)
    assert hungry.tried == [8192, 4096, 2048]
    assert whole.missing == {DEEPSPEED: "out of memory; with 2,048 tokens: out of memory"}
    assert (
        capsys.readouterr().err.count("tokens: not measured") == 2
    )  # there would be nothing to compare with
    assert set(whole.seconds) == {OURS, AUTO_EP, DENSE}


def test_our_layer_must_not_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MoELayer, "forward", gone)
    with pytest.raises(torch.OutOfMemoryError):
        measure(SHAPE, CPU, torch.float32, repeats=2, peers={})


# --- arithmetic ------------------------------------------------------------------------------------------------


def test_flops_are_those_of_three_products_an_expert_and_the_dense_network_has_as_many() -> None:
    shape = Shape("counted", 10, 4, 6, 5, 2)
    assert shape.flops == 3 * (2 * 10 * (2 * 3 * 4 * 6 + 4 * 5))
    weights = sum(
        parameter.numel() for parameter in dense(shape, CPU, torch.float32).module.parameters()
    )
    assert weights == 2 * 3 * 4 * 6
    assert shape.bytes(4) == 4 * (3 * (5 * 3 * 4 * 6 + 5 * 4) + 5 * 10 * 4)


def test_the_least_time_is_that_of_the_nearer_limit() -> None:
    shape = Shape("counted", 10, 4, 6, 5, 2)
    seconds, which = Limits(shape.flops, shape.bytes(4) / 2).least_seconds(shape, torch.float32)
    assert (seconds, which) == (2.0, "memory")
    assert Limits(shape.flops / 3, 1e30).least_seconds(shape, torch.float32) == (3.0, "compute")


def test_a_product_has_two_operations_a_step_and_a_copy_reads_and_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "stopwatch_of", lambda device: lambda work: (work(), 0.5)[1])
    found = limits.measure_limits(CPU, torch.float32, quick=True, repeats=2)
    assert found == (2 * 64**3 / 0.5, 2 * 65536 / 0.5)


def test_ratios_have_the_right_way_round() -> None:
    shape = Shape("told", 1, 1, 1, 1, 1, Bounds(1.2, 1.5), Bounds(1.3, 1.1))
    seconds = {OURS: [1.0, 2.0], DEEPSPEED: [1.4, 2.8], DENSE: [0.8, 1.6]}
    found = Measured(shape, seconds=seconds, peak_bytes=dict.fromkeys(seconds, 1 << 20))
    lines = {
        line.name: line for line in figures(found, Limits(12.0, 1e9), torch.float32, on_gpu=False)
    }
    faster, slower = (
        lines[f"told, even: speed against {DEEPSPEED}"],
        lines[f"told, even: time against {DENSE}"],
    )
    assert (
        faster.value is not None
        and faster.value.median == pytest.approx(1.4)
        and faster.verdict() == "floor"
    )
    assert (
        slower.value is not None
        and slower.value.median == pytest.approx(1.25)
        and slower.verdict() == "floor"
    )
    share = lines["told, even: least possible time / time"].value
    assert (
        share is not None
        and share.high <= 2.0
        and share.median == pytest.approx(2.0 * (1 + 0.5) / 2)
    )
    both = mean_figures(
        [found, Measured(shape, seconds=seconds | {DEEPSPEED: [5.6, 11.2]})], Bounds(1, 2), Bounds()
    )
    assert (
        both[0].value is not None
        and both[0].value.median == pytest.approx(2.8)
        and both[0].verdict() == "goal"
    )
    assert geometric_mean([1.4, 5.6]) == pytest.approx(2.8)


def test_the_most_memory_that_is_held_at_once_is_counted() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first + 1  # both at once
        del first
        second.add_(1)
        torch.ones(500)

    assert peak_tensor_bytes(work, CPU) == pytest.approx(8000, abs=200)


def test_another_stopwatch_may_take_the_time() -> None:
    calls: list[str] = []
    taken = benchmark.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        warmup=1,
        stopwatch=lambda work: (work(), 7.0)[1],  # type: ignore[func-returns-value]
    )
    assert taken == {"a": [7.0, 7.0], "b": [7.0, 7.0]} and "".join(calls) == "baabba"


def test_the_measured_layers_are_large_enough_for_a_gpu() -> None:
    assert all(
        shape.flops > 4e12 and shape.faster.floor and shape.overhead.goal for shape in GPU_SHAPES
    )
    assert len({shape.name for shape in CPU_SHAPES}) == 4


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_moe", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (
        "--quick" in done.stdout
        and "examples:" in done.stdout
        and Path("data/bench/moe.json").name in done.stdout
    )


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick", "--device", "cuda"]) == 2
    assert "torch sees no GPU here; use --device cpu" in capsys.readouterr().err
