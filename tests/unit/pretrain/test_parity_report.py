"""The table and the JSON of `pretrain.parity`."""

from __future__ import annotations

import json
import math

import torch

from pretrain.parity import report
from pretrain.parity.cases import Case
from pretrain.parity.compare import Difference, compare_traces
from pretrain.parity.job import Job, Result, worst_from_json, worst_to_json
from tests.unit.pretrain.parity_support import changed_trace, make_result, make_trace

WIDE = 150


def doubled_gradient() -> Result:
    actual = changed_trace("0/gradient/gate", lambda t: t * 2)
    return make_result("mismatch", actual | {"0/norm/norm": torch.tensor(6.0)})


def test_a_job_is_restored_from_json() -> None:
    cases = (Case(zero="3"),)
    job = Job(runs={"run": "run.yaml"}, cases=cases, pairs=8, folder="/f", seconds=3.0, first=1)
    assert Job.from_json(job.to_json()) == job


def test_results_are_restored_from_json_with_infinite_values() -> None:
    infinite = make_result("mismatch", changed_trace("0/gradient/gate", lambda t: t * math.nan))
    for result in (make_result(), infinite, make_result("hang", reason="late")):
        text = json.dumps(result.to_json(), allow_nan=False)
        assert Result.from_json(json.loads(text)) == result
    text = json.dumps(worst_to_json(infinite.worst), allow_nan=False)
    assert worst_from_json(json.loads(text)) == infinite.worst


def test_columns_are_aligned() -> None:
    header, separator = report.header(WIDE)
    rows = [report.row(result, WIDE) for result in (make_result(), doubled_gradient())]
    column = header.index("result")
    assert len(separator) == len(header)
    assert [row[column:] for row in rows] == ["ok", "MISMATCH: norm, gradient"]
    name_column = header.index("gradient (name)") + len("gradient ")
    assert rows[1][name_column:].startswith("gate ")


def test_an_unsupported_case_shows_its_reason() -> None:
    row = report.row(make_result("unsupported", reason="it does not fit"), WIDE)
    assert row.endswith("unsupported: it does not fit")


def test_the_narrow_table_fits_80_columns() -> None:
    actual = changed_trace("0/gradient/gate", lambda t: t * 2)
    mismatch = make_result("mismatch", actual)
    header, separator = report.header(80)
    rows = [report.row(result, 80) for result in (make_result(), mismatch)]
    assert max(map(len, [header, separator, rows[0]])) <= 80
    assert [row[header.index("result") :] for row in rows] == ["ok", "MISMATCH: gradient"]
    assert rows[1][: header.index(" weights")].endswith(" 1")
    assert max(map(len, report.summary([mismatch], {}, 80))) <= 80


def test_mismatches_are_listed_with_their_tolerances() -> None:
    lines = report.mismatch_lines(doubled_gradient())
    (line,) = [line for line in lines if "gradient:" in line]
    assert all(part in line for part in ("difference 1 ", "gate", "tolerance 1e-05"))


def test_other_weights_with_mismatches_are_listed() -> None:
    actual = changed_trace("0/gradient/gate", lambda t: t * 3)
    name = "0/gradient/a.experts.w1@0:4"
    actual[name] = make_trace()[name] * 2
    first, second = report.mismatch_lines(make_result("mismatch", actual))[:2]
    assert all(part in first for part in ("gradient:", "difference 2 ", "gate"))
    assert "a.experts.w1, of 2" in second


def test_the_summary_shows_tolerances_and_counts() -> None:
    results = [make_result(), doubled_gradient()]
    errors = {"run": {"gradient": Difference(3e-6, "gate")}}
    summary = report.summary(results, errors)
    text = " ".join(summary)
    assert "1e-05 in fp32" in text and "0.005 in bf16" in text and "gradient 3e-06" in text
    assert summary[-1] == "2 cases: 1 ok, 1 mismatch" and "rounding alone" not in text


def test_a_large_error_of_the_reference_is_reported() -> None:
    errors = {"run": {"gradient": Difference(3e-5, "gate")}}
    assert "rounding alone" in "\n".join(report.summary([doubled_gradient()], errors))


def test_long_names_are_shortened_in_the_middle() -> None:
    name = f"0/gradient/{'x' * 60}.end"
    reference = {name: torch.zeros(1), "0/norm/norm": torch.tensor(1.0)}
    worst = compare_traces(reference | {name: torch.ones(1)}, reference).worst
    result = Result(case=Case(), world_size=2, status="ok", worst=worst)
    header, _ = report.header(report.FULL_WIDTH)
    row = report.row(result, report.FULL_WIDTH)
    assert "..xxxxxxxxx.end" in row
    assert row.index("ok") == header.index("result")
