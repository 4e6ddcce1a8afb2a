"""`vlmoe check-parallel` as a person calls it: with ranks of its own, and with those of
torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, clean_environment, torchrun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMAND = ["-m", "pretrain", "check-parallel"]


def test_it_starts_its_own_ranks_for_several_worlds_and_writes_json(tmp_path: Path) -> None:
    run, out = tmp_path / "run.yaml", tmp_path / "parity.json"
    run.write_text("extends: [b16, vmoe]\nname: mine\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            *COMMAND,
            str(run),
            "--small",
            "--world-size",
            "1,2",
            "--cells",
            "ep=1,2 zero=1 accum=4",
            "--out",
            str(out),
            "precision.compute=fp32",
            "optim.lr=1e-3",
        ],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    by_cell = {(c["world_size"], c["cell"]["expert_parallel_size"]): c for c in found["cells"]}
    assert {key: c["status"] for key, c in by_cell.items()} == {
        (1, 1): "ok",
        (1, 2): "unsupported",
        (2, 1): "ok",
        (2, 2): "ok",
    }
    both = by_cell[2, 2]
    assert (
        both["facts"]["dropped"] > 0
        and {"importance", "weighted/load"} <= both["each"]["term"].keys()
    )
    assert {"blocks.1.ffn.gate.weight", "blocks.1.ffn.experts.w1", "log_scale"} <= both["each"][
        "gradient"
    ].keys()
    assert found["float64"]["run"]["gradient"]["value"] < 1e-5
    assert "4 cells: 3 ok, 1 unsupported" in done.stdout


def test_it_uses_the_ranks_of_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    done = torchrun(
        [*COMMAND, "tiny", "--small", "--cells", "ep=2 zero=1,3", "--out", str(out)],
        processes=2,
        timeout_seconds=200,
    ).check()
    assert done.output.count("seconds") + done.output.count("verdict") == 1, (
        done.output
    )  # one rank speaks
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["complete"] and [cell["status"] for cell in found["cells"]] == ["ok", "ok"]
    assert {cell["world_size"] for cell in found["cells"]} == {2}


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("presets", ["[tiny]", "[s16, limoe]", "[s16, ours]"])
def test_every_cell_of_one_two_and_four_ranks(presets: str, tmp_path: Path) -> None:
    run, out = tmp_path / "run.yaml", tmp_path / "parity.json"
    run.write_text(f"extends: {presets}\nname: mine\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            *COMMAND,
            str(run),
            "--small",
            "--world-size",
            "1,2,4",
            "--out",
            str(out),
            "precision.compute=fp32",
        ],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    # Of each size of expert parallelism: 4 stages x 2 formats x 2 x 2, and 4 stages with no pair
    # and a rank's missing, and by the routers' terms.
    assert [
        sum(c["world_size"] == world_size and c["status"] == "ok" for c in cells)
        for world_size in (1, 2, 4)
    ] == [44, 88, 132]
    assert all(c["reason"] for c in cells if c["status"] != "ok")
