"""The table and the JSON of `pretrain.parity`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pretrain.parity.cases import Case
from pretrain.parity.compare import compare_traces
from pretrain.parity.job import Job, Result, append_message, case_message, read_messages
from pretrain.parity.report import Report, mismatch_lines, row
from tests.unit.pretrain.parity_support import changed_trace, make_result, make_trace


def doubled_gradient() -> Result:
    actual = changed_trace("0/gradient/gate", lambda t: t * 2)
    return make_result("mismatch", actual | {"0/norm/norm": torch.tensor(6.0)})


def infinite_gradient() -> Result:
    return make_result("mismatch", changed_trace("0/gradient/gate", lambda t: t * math.nan))


def report_of(*results: Result, out: Path | None = None, is_rank_zero: bool = True) -> Report:
    report = Report(metadata={"run": "tiny"}, out=out, is_rank_zero=is_rank_zero)
    for result in results:
        report.add(result)
    return report


def test_a_job_is_restored_from_json() -> None:
    cases = (Case(zero="3"),)
    job = Job(runs={"run": "run.yaml"}, cases=cases, pairs=8, folder="/f", seconds=3.0, first=1)
    assert Job.from_json(json.dumps(asdict(job))) == job


def test_results_are_restored_from_messages_with_infinite_values(tmp_path: Path) -> None:
    path, results = tmp_path / "m", [make_result(), infinite_gradient(), doubled_gradient()]
    results.append(make_result("hang", reason="late"))
    for index, result in enumerate(results):
        append_message(path, case_message(index, result))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"case": 4, "resu')  # being written
    messages = read_messages(path)
    assert [message["case"] for message in messages] == [0, 1, 2, 3]
    assert [Result.from_json(message["result"]) for message in messages] == results


def test_columns_are_aligned_and_fit_80_characters(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of()
    report.print_header()
    header, separator = capsys.readouterr().out.splitlines()
    rows = [row(result) for result in (make_result(), doubled_gradient())]
    column = header.index("result")
    assert column <= 80 and len(separator) == len(header)
    assert [line[column:] for line in rows] == ["ok", "MISMATCH: norm, gradient"]
    assert rows[1][: header.index(" weights")].endswith(" 1")


def test_an_unsupported_case_shows_its_reason() -> None:
    line = row(make_result("unsupported", reason="it does not fit"))
    assert line.endswith("unsupported: it does not fit")


def test_mismatches_are_listed_with_their_tolerances() -> None:
    (line,) = [line for line in mismatch_lines(doubled_gradient()) if " gradient:" in line]
    assert all(part in line for part in ("difference 1,", "tolerance 1e-05", "1 of 4: gate"))


def test_all_weights_with_mismatches_are_listed_largest_first() -> None:
    actual = changed_trace("0/gradient/gate", lambda t: t * 3)
    name = "0/gradient/a.experts.w1@0:4"
    actual[name] = make_trace()[name] * 2
    first = mismatch_lines(make_result("mismatch", actual))[0]
    assert "difference 2," in first and first.endswith("2 of 4: gate, a.experts.w1@0:4")


def test_the_summary_shows_tolerances_and_counts() -> None:
    report = report_of(make_result(), doubled_gradient())
    report.float32_errors["run"] = {"gradient": 3e-6}
    summary = report.summary()
    tolerances = {line.split()[-1]: line.split()[:2] for line in summary if line}
    assert tolerances["gradient"] == ["1e-05", "0.02"]
    assert tolerances["median-gradient"] == ["1e-05", "0.004"]
    assert "gradient 3e-06" in "\n".join(summary) and "rounding alone" not in "\n".join(summary)
    assert summary[-1] == "2 cases: 1 ok, 1 mismatch"

    report.float32_errors["run"] = {"gradient": 3e-5}
    assert "rounding alone" in "\n".join(report.summary())


def test_the_json_lists_all_gradients_but_only_the_largest_other_differences(
    tmp_path: Path,
) -> None:
    reference = {"0/norm/norm": torch.tensor(1.0)}
    for index in range(50):
        reference[f"0/gradient/w{index}"] = torch.ones(1)
        reference[f"start/parameters/w{index}"] = torch.ones(1)
    actual = reference | {"0/gradient/w7": torch.full((1,), math.nan)}
    result = Result(
        case=Case(), world_size=2, status="ok", differences=compare_traces(actual, reference)
    )
    out = tmp_path / "parity.json"
    report_of(result, out=out)
    values = json.loads(out.read_text(encoding="utf-8"))
    assert not values["complete"] and values["run"] == "tiny"
    (case,) = values["cases"]
    assert len(case["differences"]["gradient"]) == 50 and len(case["differences"]["start"]) == 20
    assert case["differences"]["gradient"]["w7"] == "inf"


def test_a_failure_after_the_last_case_fails_the_check_but_a_missing_float64_does_not() -> None:
    report = report_of(make_result())
    report.handle_message({"no_float64_reference": "timed out"})
    assert report.is_ok
    report.handle_message({"failure": "rank 1 crashed"})
    assert not report.is_ok


def test_other_ranks_print_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity.json"
    report = report_of(doubled_gradient(), out=out, is_rank_zero=False)
    report.finish()
    assert capsys.readouterr().out == "" and not out.exists() and not report.is_ok
