"""`pretrain.check` names the quantity that a planted fault gets wrong, and ends cells that hang or
fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.check.cells import Cell
from pretrain.check.job import Outcome
from tests.support.parity_runs import outcomes, told

WORKER = ("-m", "tests.support.faulty_worker")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


class Planted(NamedTuple):
    """A fault and how it must be seen."""

    fault: str
    misses: dict[str, str]
    """Quantities that must be told, with a part of the name of what is most off."""
    passes: tuple[str, ...] = ()
    """Quantities that the fault leaves alone, which must not be told."""
    run: str = "plain"
    cell: Cell = Cell(expert_parallel_size=2, zero="1", missing="pairs")


LOOSE = Cell(expert_parallel_size=1, zero="2", accumulation=2, missing="none")
VALUES = ("loss", "term", "counts", "choices")
"""What the forward pass of the first step gives."""

PLANTED = (
    Planted("expert_gradients_times_ranks", {"gradient": ".experts.", "norm": ""}, VALUES),
    Planted(
        "expert_gradients_times_ranks",
        {"gradient": ".experts."},
        VALUES,
        cell=Cell(expert_parallel_size=2, zero="0", precision="bf16"),
    ),
    Planted("auxiliary_share_averaged", {"gradient": ".gate."}, VALUES),
    Planted(
        "auxiliary_share_averaged",
        {"gradient": ".gate."},
        VALUES,
        "noisy",
        Cell(expert_parallel_size=2, zero="2", accumulation=2),
    ),
    # As large as in the presets: beside the other gradients these are nothing in bfloat16.
    Planted(
        "auxiliary_share_averaged",
        {"gradient": "", "norm": ""},
        VALUES,
        "usual",
        Cell(expert_parallel_size=2, zero="1", precision="bf16", terms="aux"),
    ),
    Planted("experts_of_the_last_rank_untold", {"gradient": "of expert 2"}, ("start", *VALUES)),
    Planted(
        "experts_of_the_last_rank_untold",
        {"gradient": "of expert 2"},
        ("start", *VALUES),
        cell=Cell(expert_parallel_size=2, zero="0", precision="bf16"),
    ),
    Planted(
        "statistics_of_both_computations",
        {"term": "", "statistics": "", "choices": ""},
        ("counts",),
        cell=Cell(expert_parallel_size=2, zero="1", recompute=True),
    ),
    Planted(
        "padding_counted",
        {"term": "balance", "statistics": "probability", "choices": "chosen"},
        ("counts",),
    ),
    Planted(
        "mean_of_norms",
        {"norm": "norm"},
        ("gradient", *VALUES),
        cell=Cell(expert_parallel_size=2, zero="0"),
    ),
    Planted(
        "untagged_expert_weight",
        {"start": "blocks.1.ffn.experts.w2"},
        ("counts",),
        cell=Cell(expert_parallel_size=2, zero="0"),
    ),
    Planted(
        "expert_weight_averaged",
        {"gradient": "blocks.1.ffn.experts.w2", "norm": ""},
        ("start", *VALUES),
        cell=Cell(expert_parallel_size=2, zero="0"),
    ),
    Planted(
        "drifted_rank",
        {"start": "caption_norm.weight"},
        ("counts", "gradient"),
        cell=Cell(expert_parallel_size=1, zero="0"),
    ),
    Planted(
        "gradients_of_the_last_rank",
        {"gradient": "blocks.2.ffn.experts.w3@2:4"},
        ("start", *VALUES),
    ),
    Planted("mean_of_means", {"term": "caption", "loss": ""}, ("counts", "choices", "statistics")),
    Planted(
        "local_negatives", {"term": "contrastive", "loss": ""}, ("counts", "choices", "statistics")
    ),
    Planted(
        "local_negatives",
        {"term": "contrastive", "loss": ""},
        ("counts", "choices", "statistics"),
        cell=LOOSE,
    ),
    Planted(
        "equal_captions_of_other_ranks",
        {"term": "contrastive"},
        ("counts", "choices", "statistics"),
    ),
    Planted("biases_by_local_load", {"biases": "biases"}, ("gradient", "norm", *VALUES), "sampled"),
    Planted("rows_return_in_wrong_order", {"loss": "", "gradient": ""}, ("counts",)),
    Planted("router_in_bfloat16", {"gradient": "", "term": "", "statistics": ""}, ("counts",)),
    Planted("noise_by_rank", {"choices": "", "statistics": ""}, ("counts",), "noisy_top_k"),
    Planted(
        "missing_pairs_shift_groups",
        {"choices": "kept"},
        ("counts",),
        "noisy",
        Cell(expert_parallel_size=1, zero="1", missing="pairs"),
    ),
    Planted("rate_does_not_arrive", {"parameters": ""}, ("gradient", "norm", *VALUES)),
    Planted("last_micro_batch_alone", {"gradient": "", "norm": ""}, VALUES, cell=LOOSE),
    Planted("negative_sign_of_score", {"choices": "", "statistics": ""}, ("counts",)),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Outcomes with each fault, and without: `faulty` and `sound`, in the order of `PLANTED`."""
    cases = [(planted.run, planted.cell) for planted in PLANTED]
    sound = list(dict.fromkeys(cases))
    faults = [planted.fault for planted in PLANTED] + [""] * len(sound)
    both = outcomes(
        cases + sound,
        2,
        tmp_path_factory.mktemp("faults"),
        worker=WORKER,
        variables={"FAULTS": json.dumps(faults)},
    )
    return {"faulty": both[: len(cases)], "sound": both[len(cases) :]}


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[planted.fault for planted in PLANTED])
def test_a_fault_is_told_by_what_it_gets_wrong(
    found: dict[str, list[Outcome]], number: int
) -> None:
    planted, outcome = PLANTED[number], found["faulty"][number]
    assert outcome.status == "miss" and outcome.verdict is not None, told(outcome)
    misses = {miss.quantity: miss.name for miss in outcome.verdict.misses}
    assert planted.misses.keys() <= misses.keys(), told(outcome)
    wrongly_named = {q: misses[q] for q, part in planted.misses.items() if part not in misses[q]}
    assert not wrongly_named, told(outcome)
    assert not set(planted.passes) & misses.keys(), told(outcome)


def test_the_same_cells_pass_without_a_fault(found: dict[str, list[Outcome]]) -> None:
    bad = [told(outcome) for outcome in found["sound"] if outcome.status != "ok"]
    assert not bad, "\n".join(bad)


def test_a_cell_that_hangs_or_fails_is_ended_and_told_and_the_others_are_checked(
    tmp_path: Path,
) -> None:
    cells = [("plain", Cell(expert_parallel_size=2, zero="0"))] * 4
    ok, stuck, failed, last = outcomes(
        cells,
        2,
        tmp_path,
        worker=WORKER,
        seconds=15,
        variables={"FAULTS": json.dumps(["", "hang", "failure", ""])},
    )
    assert (ok.status, last.status) == ("ok", "ok")
    assert stuck.status == "hang" and "no end after 15 s" in stuck.reason
    assert "rank 1" in stuck.reason and "2x ep2 zero0" in stuck.reason
    assert (
        failed.status == "error" and "rank 1" in failed.reason and "the sky falls" in failed.reason
    )
    assert stuck.is_bad and failed.is_bad
