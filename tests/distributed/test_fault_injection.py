"""`pretrain.parity` detects each injected fault in the expected quantities and stops hung cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.parity.cases import Case
from pretrain.parity.job import Result
from tests.support.parity_runs import describe, run_cases

WORKER = ("-m", "tests.support.fault_injection_worker")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


class InjectedFault(NamedTuple):
    """A fault and the mismatches that it must cause."""

    fault: str
    mismatches: dict[str, str]
    """Quantities that must differ, with a part of the name of the largest difference."""
    passes: tuple[str, ...] = ()
    """Quantities that must not differ."""
    run: str = "plain"
    case: Case = Case(expert_parallel_size=2, zero="1", missing="pairs")


ACCUMULATION = Case(expert_parallel_size=1, zero="2", accumulation=2, missing="none")
FORWARD_QUANTITIES = ("loss", "term", "counts", "assignments")
"""Quantities of the first forward pass."""

FAULTS = (
    InjectedFault(
        "expert_gradients_scaled_by_expert_parallel_size",
        {"gradient": ".experts.", "norm": ""},
        FORWARD_QUANTITIES,
    ),
    InjectedFault(
        "expert_gradients_scaled_by_expert_parallel_size",
        {"gradient": ".experts."},
        FORWARD_QUANTITIES,
        case=Case(expert_parallel_size=2, zero="0", precision="bf16"),
    ),
    InjectedFault(
        "auxiliary_terms_averaged_over_ranks", {"gradient": ".gate."}, FORWARD_QUANTITIES
    ),
    InjectedFault(
        "auxiliary_terms_averaged_over_ranks",
        {"gradient": ".gate."},
        FORWARD_QUANTITIES,
        "noisy",
        Case(expert_parallel_size=2, zero="2", accumulation=2),
    ),
    # Balance weights as in the presets, and auxiliary terms alone: added to the gradients of the
    # other terms, theirs would be lost in the rounding of bfloat16.
    InjectedFault(
        "auxiliary_terms_averaged_over_ranks",
        {"gradient": "", "norm": ""},
        FORWARD_QUANTITIES,
        "usual",
        Case(expert_parallel_size=2, zero="1", precision="bf16", terms="aux"),
    ),
    InjectedFault(
        "missing_expert_gradients_of_last_rank",
        {"gradient": "of expert 2"},
        ("start", *FORWARD_QUANTITIES),
    ),
    InjectedFault(
        "missing_expert_gradients_of_last_rank",
        {"gradient": "of expert 2"},
        ("start", *FORWARD_QUANTITIES),
        case=Case(expert_parallel_size=2, zero="0", precision="bf16"),
    ),
    InjectedFault(
        "statistics_counted_in_recomputation",
        {"term": "", "statistics": "", "assignments": ""},
        ("counts",),
        case=Case(expert_parallel_size=2, zero="1", recompute=True),
    ),
    InjectedFault(
        "padding_counted_as_tokens",
        {"term": "balance", "statistics": "probability", "loads": "experts"},
        ("counts",),
    ),
    InjectedFault(
        "clip_by_mean_of_local_norms",
        {"norm": "norm"},
        ("gradient", *FORWARD_QUANTITIES),
        case=Case(expert_parallel_size=2, zero="0"),
    ),
    InjectedFault(
        "expert_weight_not_tagged",
        {"start": "blocks.1.ffn.experts.w2"},
        ("counts",),
        case=Case(expert_parallel_size=2, zero="0"),
    ),
    InjectedFault(
        "expert_gradient_averaged_over_ranks",
        {"gradient": "blocks.1.ffn.experts.w2", "norm": ""},
        ("start", *FORWARD_QUANTITIES),
        case=Case(expert_parallel_size=2, zero="0"),
    ),
    InjectedFault(
        "perturbed_weights_on_last_rank",
        {"start": "caption_norm.weight"},
        ("counts", "gradient"),
        case=Case(expert_parallel_size=1, zero="0"),
    ),
    InjectedFault(
        "scaled_gradients_on_last_rank",
        {"gradient": "blocks.2.ffn.experts.w3@2:4"},
        ("start", *FORWARD_QUANTITIES),
    ),
    InjectedFault(
        "caption_loss_mean_of_means",
        {"term": "caption", "loss": ""},
        ("counts", "assignments", "statistics"),
    ),
    InjectedFault(
        "negatives_from_local_rank_only",
        {"term": "contrastive", "loss": ""},
        ("counts", "assignments", "statistics"),
    ),
    InjectedFault(
        "negatives_from_local_rank_only",
        {"term": "contrastive", "loss": ""},
        ("counts", "assignments", "statistics"),
        case=ACCUMULATION,
    ),
    InjectedFault(
        "duplicate_captions_of_other_ranks_unmasked",
        {"term": "contrastive"},
        ("counts", "assignments", "statistics"),
    ),
    InjectedFault(
        "router_bias_from_local_load",
        {"biases": "biases"},
        ("gradient", "norm", *FORWARD_QUANTITIES),
        "sampled",
    ),
    InjectedFault("expert_outputs_swapped", {"loss": "", "gradient": ""}, ("counts",)),
    InjectedFault(
        "router_in_bfloat16", {"gradient": "", "term": "", "statistics": ""}, ("counts",)
    ),
    InjectedFault(
        "routing_noise_seeded_by_rank",
        {"assignments": "", "statistics": ""},
        ("counts",),
        "noisy",
    ),
    InjectedFault(
        "capacity_groups_shifted_by_missing_pairs",
        {"assignments": "kept"},
        ("counts",),
        "noisy",
        Case(expert_parallel_size=1, zero="1", missing="pairs"),
    ),
    InjectedFault(
        "learning_rate_never_updated", {"parameters": ""}, ("gradient", "norm", *FORWARD_QUANTITIES)
    ),
    InjectedFault(
        "earlier_micro_batches_dropped",
        {"gradient": "", "norm": ""},
        FORWARD_QUANTITIES,
        case=ACCUMULATION,
    ),
    InjectedFault(
        "gradients_accumulated_in_bfloat16",
        {"median-gradient": ""},
        FORWARD_QUANTITIES,
        case=Case(zero="0", accumulation=16, precision="bf16"),
    ),
    InjectedFault("negated_router_logits", {"assignments": "", "statistics": ""}, ("counts",)),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Results `with_fault`, in the order of `FAULTS`, and `without_fault`."""
    cases = [replace(injected.case, run=injected.run) for injected in FAULTS]
    distinct = list(dict.fromkeys(cases))
    faults = [injected.fault for injected in FAULTS] + [""] * len(distinct)
    both = run_cases(
        cases + distinct,
        2,
        tmp_path_factory.mktemp("faults"),
        worker=WORKER,
        variables={"FAULTS": json.dumps(faults)},
    )
    return {"with_fault": both[: len(cases)], "without_fault": both[len(cases) :]}


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[injected.fault for injected in FAULTS])
def test_fault_is_detected_in_the_expected_quantities(
    results: dict[str, list[Result]], index: int
) -> None:
    injected, result = FAULTS[index], results["with_fault"][index]
    assert result.status == "mismatch", describe(result)
    mismatches = {mismatch.quantity: mismatch.name for mismatch in result.mismatches}
    assert injected.mismatches.keys() <= mismatches.keys(), describe(result)
    wrong_names = {
        q: mismatches[q] for q, part in injected.mismatches.items() if part not in mismatches[q]
    }
    assert not wrong_names, describe(result)
    assert not set(injected.passes) & mismatches.keys(), describe(result)


def test_the_same_cases_pass_without_a_fault(results: dict[str, list[Result]]) -> None:
    failures = [describe(o) for o in results["without_fault"] if o.status != "ok"]
    assert not failures, "\n".join(failures)


def test_other_cases_are_checked_if_one_hangs_or_fails(tmp_path: Path) -> None:
    cases = [Case(run="plain", expert_parallel_size=2, zero="0")] * 4
    ok, hung, failed, last = run_cases(
        cases,
        2,
        tmp_path,
        worker=WORKER,
        seconds=15,
        variables={"FAULTS": json.dumps(["", "one_rank_hangs", "one_rank_raises", ""])},
    )
    assert (ok.status, last.status) == ("ok", "ok")
    assert hung.status == "hang" and "timed out after 15 s" in hung.reason
    assert "rank 1" in hung.reason and "2x ep2 zero0" in hung.reason
    assert (
        failed.status == "error" and "rank 1" in failed.reason and "injected error" in failed.reason
    )
    assert hung.is_failure and failed.is_failure
