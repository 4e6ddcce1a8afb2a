"""What `pretrain.check` makes of two traces: differences, verdict, table, JSON and exit status."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.common.errors import LayoutError
from pretrain.check import command, report
from pretrain.check.cells import Cell
from pretrain.check.compare import (
    Difference,
    Verdict,
    all_choices,
    compared,
    judge,
    merge,
    missing_names,
    relative,
)
from pretrain.check.job import Case, Job, Outcome, plain_worst, read_worst
from pretrain.check.launch import run_on_this_machine
from pretrain.cli.main import main
from pretrain.parallel.environment import rank_environment


def trace() -> dict[str, Tensor]:
    """A trace of a model with four experts, as a process that holds all of them has it."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {
        "start/parameters/w": torch.ones(300),
        "0/parameters/w": torch.ones(300) * 2,
    }
    for step in (0, 1, 2):
        found |= {
            f"{step}/loss/total": torch.tensor(2.0),
            f"{step}/term/balance": torch.tensor(1.0),
            f"{step}/term/shortfall": torch.tensor(1e-7),
            f"{step}/norm/norm": torch.tensor(3.0),
            f"{step}/counts/pairs": torch.tensor(8.0),
            f"{step}/biases/biases": torch.zeros(1, 2, 4),
            f"{step}/choices/chosen": torch.tensor([[[10.0, 20.0, 30.0, 40.0]]])
            .expand(1, 2, 4)
            .clone(),
            f"{step}/statistics/z": torch.tensor([1.0, 2.0]),
        }
    found["2/parameters/w"] = torch.ones(300) * 3
    found["0/gradient/a.experts.w1@0:4"] = torch.randn(4, 3, generator=generator)
    found["0/gradient/gate"] = torch.randn(5, generator=generator)
    return found


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    mine = trace()
    mine[name] = change(mine[name].clone())
    return mine


def misses(mine: dict[str, Tensor], precision: str = "fp32") -> dict[str, str]:
    truth = trace()
    worst = merge([compared(mine, truth).worst, missing_names(mine, truth)])
    return {miss.quantity: miss.name for miss in judge(worst, precision, all_choices(truth)).misses}


def _moved(count: int) -> Callable[[Tensor], Tensor]:
    """So many choices fall to the next expert."""

    def move(chosen: Tensor) -> Tensor:
        chosen[0, 0, 0] -= count
        chosen[0, 0, 1] += count
        return chosen

    return move


def test_equal_traces_have_no_miss() -> None:
    assert misses(trace()) == {} and misses(trace(), "bf16") == {}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("start/parameters/w", lambda t: t * (1 + 1e-6), {"start": "w"}),
        ("0/loss/total", lambda t: t * (1 + 2e-5), {"loss": "total"}),
        ("0/term/balance", lambda t: t * (1 - 2e-5), {"term": "balance"}),
        (
            "0/term/shortfall",
            lambda t: t + 2e-7,
            {"term": "shortfall"},
        ),  # made of digits of about 1e-2
        ("0/norm/norm", lambda t: t * (1 + 2e-5), {"norm": "norm"}),
        ("0/gradient/gate", lambda t: t * (1 + 2e-5), {"gradient": "gate"}),
        ("0/statistics/z", lambda t: 2 * t, {"statistics": "z"}),
        ("0/counts/pairs", lambda t: t - 1, {"counts": "pairs"}),
        ("0/choices/chosen", _moved(1), {"choices": "chosen"}),
        ("0/choices/chosen", lambda t: 2 * t, {"choices": "chosen"}),
        ("0/biases/biases", lambda t: t + 1e-5, {"biases": "biases"}),
        ("0/parameters/w", lambda t: t * (1 + 2e-3), {"parameters": "w"}),
        ("0/parameters/w", lambda t: t * (1 + 2e-2), {"parameters": "w", "update": "w"}),
        ("1/loss/total", lambda t: t * (1 + 2e-4), {"later": "total (step 2)"}),
        ("2/norm/norm", lambda t: t * math.nan, {"later": "norm (step 3)"}),
        ("2/parameters/w", lambda t: t * (1 + 2e-3), {"later-parameters": "w (step 3)"}),
        ("2/biases/biases", lambda t: t - 1e-5, {"later-biases": "biases (step 3)"}),
        ("0/gradient/gate", lambda t: t * math.nan, {"gradient": "gate"}),
        ("0/gradient/gate", lambda t: t[:2], {"gradient": "gate"}),
    ],
)
def test_each_quantity_is_told_by_its_name(
    name: str, change: Callable[[Tensor], Tensor], told: dict[str, str]
) -> None:
    assert misses(changed(name, change)) == told


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0/loss/total", lambda t: t * (1 + 5e-6)),
        ("0/gradient/gate", lambda t: t * (1 - 5e-6)),
        ("1/loss/total", lambda t: t * (1 + 5e-5)),
        ("0/term/shortfall", lambda t: t + 5e-8),
    ],
)
def test_rounding_is_no_miss(name: str, change: Callable[[Tensor], Tensor]) -> None:
    assert misses(changed(name, change)) == {}


def test_a_slice_of_the_experts_is_compared_with_the_same_slice() -> None:
    truth, mine = trace(), trace()
    whole = mine.pop("0/gradient/a.experts.w1@0:4")
    mine["0/gradient/a.experts.w1@2:4"] = whole[2:4]
    assert compared(mine, truth).worst["gradient"].value == 0
    mine["0/gradient/a.experts.w1@2:4"] = whole[0:2]
    assert compared(mine, truth).worst["gradient"] == Difference(
        relative(whole[0:2], whole[2:4]), "a.experts.w1@2:4"
    )
    assert compared(mine, truth).each["gradient"] == {
        "gate": 0.0,
        "a.experts.w1": pytest.approx(relative(whole[0:2], whole[2:4])),
    }


def test_a_gradient_that_no_rank_has_or_that_should_not_be_is_a_miss() -> None:
    mine = trace()
    del mine["0/gradient/gate"]
    assert misses(mine) == {"gradient": "no gate"}
    assert misses(trace() | {"0/gradient/new": torch.ones(1)}) == {"gradient": "new"}


def test_experts_that_no_rank_tells_of_are_a_miss() -> None:
    def with_slices(*spans: tuple[int, int]) -> dict[str, Tensor]:
        mine = trace()
        whole = mine.pop("0/gradient/a.experts.w1@0:4")
        return mine | {f"0/gradient/a.experts.w1@{a}:{b}": whole[a:b] for a, b in spans}

    assert misses(with_slices((0, 2), (2, 4))) == {} == misses(with_slices((1, 4), (0, 2)))
    assert misses(with_slices((0, 2))) == {"gradient": "no a.experts.w1 of expert 2"}
    assert misses(with_slices((0, 1), (2, 4))) == {"gradient": "no a.experts.w1 of expert 1"}
    assert misses(with_slices((2, 4))) == {"gradient": "no a.experts.w1 of expert 0"}


def test_weights_in_bfloat16_are_judged_by_the_way_that_they_have_come() -> None:
    """They went from 1 to 2: a step that was not made is wrong, one that is a third off may be
    Adam's."""

    def gone(to: float) -> dict[str, Tensor]:
        return changed("0/parameters/w", lambda w: torch.full_like(w, to))

    assert misses(gone(1.67), "bf16") == {}
    assert misses(gone(1.0), "bf16") == {"update": "w"} == misses(gone(3.0), "bf16")
    assert misses(gone(1.999)) == {} and misses(gone(1.97)) == {"parameters": "w", "update": "w"}


def test_later_near_ties_are_told() -> None:
    def moved(choices: float) -> Verdict:
        mine = changed("1/choices/chosen", lambda t: t + torch.tensor([choices, -choices, 0, 0]))
        return judge(compared(mine, trace()).worst, "fp32", 1e5)

    assert moved(1.0) == Verdict((), 0, 2) and moved(1.0).is_rough and not moved(0.0).is_rough
    assert [miss.quantity for miss in moved(9.0).misses] == ["later-choices"]


def test_bfloat16_is_judged_on_the_first_step_and_less_strictly() -> None:
    assert misses(changed("0/gradient/gate", lambda t: t * 1.01), "bf16") == {}
    assert misses(changed("0/gradient/gate", lambda t: t * 1.03), "bf16") == {"gradient": "gate"}
    assert misses(changed("2/loss/total", lambda t: t * 2), "bf16") == {}
    worst = compared(changed("0/gradient/gate", lambda t: t * 1.03), trace()).worst
    assert not judge(worst, "bf16", 200.0, other_rounding=True).misses
    assert judge(worst, "fp32", 200.0, other_rounding=True).misses


def test_a_few_near_ties_among_very_many_choices_are_no_miss_and_make_the_cell_a_loose_one() -> (
    None
):
    mine = changed("0/choices/chosen", _moved(1)) | {
        "0/gradient/gate": trace()["0/gradient/gate"] * (1 + 1e-3)
    }
    worst = compared(mine, trace()).worst
    verdict = judge(worst, "fp32", 1e5)
    assert (verdict.misses, verdict.ties) == ((), 1)
    assert {miss.quantity for miss in judge(worst, "fp32", 200.0).misses} == {"choices", "gradient"}


def test_a_tie_in_a_later_step_ends_the_comparison_of_later_steps_only() -> None:
    mine = changed("1/choices/chosen", _moved(1)) | {"2/loss/total": torch.tensor(9.0)}
    worst = compared(mine, trace()).worst
    assert not judge(worst, "fp32", 1e5).misses
    assert {miss.quantity for miss in judge(worst, "fp32", 200.0).misses} == {
        "later",
        "later-choices",
    }


def outcome(status: str = "ok", mine: dict[str, Tensor] | None = None, **fields: Any) -> Outcome:
    if status not in ("ok", "miss"):
        return Outcome(run="run", world_size=2, cell=Cell(), status=status, **fields)
    worst = compared(mine or trace(), trace()).worst
    verdict = judge(worst, "fp32", all_choices(trace()))
    each = compared(mine or trace(), trace()).each
    return Outcome(
        run="run",
        world_size=2,
        cell=Cell(),
        status="miss" if verdict.misses else "ok",
        worst=worst,
        verdict=verdict,
        each=each,
        **fields,
    )


def test_outcomes_survive_json_also_infinite_ones() -> None:
    bad = outcome("miss", changed("0/gradient/gate", lambda t: t * math.nan))
    for one in (outcome(), bad, outcome("hang", reason="late")):
        text = json.dumps(one.to_json(), allow_nan=False)
        assert Outcome.from_json(json.loads(text)) == one
    assert read_worst(json.loads(json.dumps(plain_worst(bad.worst), allow_nan=False))) == bad.worst


def test_the_table_shows_worst_values_names_and_verdicts_in_straight_columns() -> None:
    bad = outcome(
        "miss", changed("0/gradient/gate", lambda t: t * 2) | {"0/norm/norm": torch.tensor(6.0)}
    )
    head, line = report.head(150)
    rows = [report.row(one, 150) for one in (outcome(), bad)]
    column = head.index("verdict")
    assert len(line) == len(head)
    assert [row[column:] for row in rows] == ["ok", "MISS: norm, gradient"]
    place = head.index(" of ") + 1
    assert rows[1][place:].startswith("gate ")
    assert "    gradient: 1 off in gate; allowed 1e-05" in report.details(bad)
    refused = report.row(outcome("unsupported", reason="it does not fit"), 150)
    assert refused.endswith("unsupported: it does not fit")
    foot = "\n".join(report.foot([outcome(), bad], {"run": {"gradient": Difference(3e-6, "gate")}}))
    assert "1e-05 in fp32" in foot and "0.02 in bf16" in foot and "gradient 3e-06" in foot
    assert foot.endswith("2 cells: 1 ok, 1 miss") and "rounding alone" not in foot
    assert "rounding alone" in "\n".join(
        report.foot([bad], {"run": {"gradient": Difference(3e-5, "gate")}})
    )


def test_a_narrow_terminal_gets_a_narrow_table() -> None:
    bad = outcome("miss", changed("0/gradient/gate", lambda t: t * 2))
    head, line = report.head(80)
    rows = [report.row(one, 80) for one in (outcome(), bad)]
    assert max(map(len, [head, line, rows[0]])) <= 80
    assert [row[head.index("verdict") :] for row in rows] == ["ok", "MISS: gradient"]
    assert rows[1][: head.index(" weights")].endswith(" 1")
    assert max(map(len, report.foot([bad], {}, 80))) <= 80


def test_other_weights_that_are_off_are_named_under_the_first() -> None:
    mine = changed("0/gradient/gate", lambda t: t * 3) | {
        "0/gradient/a.experts.w1@0:4": trace()["0/gradient/a.experts.w1@0:4"] * 2
    }
    assert report.details(outcome("miss", mine))[:2] == [
        "    gradient: 2 off in gate; allowed 1e-05",
        "        also a.experts.w1, of 2",
    ]


def test_long_names_are_cut_in_the_middle() -> None:
    long = {f"0/gradient/{'x' * 60}.end": torch.zeros(1), "0/norm/norm": torch.tensor(1.0)}
    worst = compared(long | {f"0/gradient/{'x' * 60}.end": torch.ones(1)}, long).worst
    one = Outcome(
        run="run", world_size=2, cell=Cell(), status="ok", worst=worst, verdict=outcome().verdict
    )
    head, _ = report.head(142)
    assert "..xxxxxxxxx.end" in report.row(one, 142)
    assert report.row(one, 142).index("ok") == head.index("verdict")


def _answering(*outcomes: Outcome) -> Callable[..., None]:
    def answer(job: Job, world_size: int, tell: Callable[[dict[str, Any]], None]) -> None:
        for number, one in enumerate(outcomes):
            tell({"case": number, "outcome": one.to_json()})
        tell({"floor": "run", "worst": {"gradient": [2e-6, "gate"]}})

    return answer


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ((outcome(),), 0),
        ((outcome(), outcome("unsupported", reason="no")), 0),
        ((outcome(), outcome("miss", changed("0/loss/total", lambda t: t * 2))), 1),
        ((outcome(), outcome("hang", reason="late")), 1),
        ((outcome(), outcome("error", reason="broken")), 1),
        ((outcome(), outcome("not-run", reason="three before it")), 1),
        ((outcome("unsupported", reason="no"),), 2),
    ],
)
def test_the_exit_status_and_the_json_say_what_was_found(
    outcomes: tuple[Outcome, ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "run_on_this_machine", _answering(*outcomes))
    out = tmp_path / "parity.json"
    assert (
        main(
            [
                "check-parallel",
                "tiny",
                "--small",
                "--world-size",
                "2",
                "--cells",
                "zero=1",
                "--out",
                str(out),
            ]
        )
        == status
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["complete"] and [cell["status"] for cell in found["cells"]] == [
        one.status for one in outcomes
    ]
    assert found["tolerance"]["first"] == {"fp32": 1e-5, "bf16": 2e-2}
    assert found["float64"]["run"]["gradient"] == {"value": 2e-6, "name": "gate"}
    assert f"{len(outcomes)} cells: " in capsys.readouterr().out


def test_cells_that_cannot_run_are_listed_and_start_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_on_this_machine", None)
    assert (
        main(["check-parallel", "tiny", "--small", "--world-size", "2", "--cells", "ep=3,5"]) == 2
    )
    shown, told = capsys.readouterr()
    assert "no cell that was asked for can run" in told
    assert (
        shown.count("unsupported: parallel.expert_parallel_size is") == 2
        and "Nothing was compared" in shown
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cells", "zeros=1"], "no axis 'zeros'"),
        (["balance.load_weight=0.1"], "balance.load_weight is 0.1"),
        (["optim.lr=-1"], "optim.lr is -1"),
    ],
)
def test_a_run_that_cannot_be_checked_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-parallel", "tiny", "--small", *words]) == 2
    shown, told = capsys.readouterr()
    assert said in told and (
        not shown or "zeros" not in said
    )  # a wrong question gets no head of a table


def test_tasks_of_srun_without_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setattr(command, "run_on_this_machine", None)
    assert main(["check-parallel", "tiny", "--small"]) == 2
    assert "srun started 16 tasks, but nothing says which rank" in capsys.readouterr().err
    with pytest.raises(LayoutError, match="start one torchrun on every node"):
        rank_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert rank_environment().world_size == 1


@pytest.mark.parametrize(
    "words", [["--world-size", "0"], ["--world-size", "2,x"], ["--timeout", "0"], ["--pairs", "-4"]]
)
def test_impossible_numbers_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check-parallel", "tiny", *words])


def test_ranks_that_end_at_once_are_told_with_their_last_output_and_tried_three_times(
    tmp_path: Path,
) -> None:
    job = Job(runs={}, cases=(Case("run", Cell()),) * 5, pairs=8, folder=str(tmp_path), seconds=5)
    answers: list[dict[str, Any]] = []
    run_on_this_machine(job, 2, answers.append, worker=["-c", "raise SystemExit('no such module')"])
    found = [Outcome.from_json(answer["outcome"]) for answer in answers]
    assert [one.status for one in found] == ["error"] * 3 + ["not-run"] * 2
    assert "no such module" in found[0].reason


def test_a_job_survives_json() -> None:
    cases = (Case("run", Cell(zero="3")),)
    job = Job(runs={"run": "run.yaml"}, cases=cases, pairs=8, folder="/f", seconds=3.0, first=1)
    assert Job.from_json(job.to_json()) == job
