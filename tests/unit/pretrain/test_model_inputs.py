"""A micro-batch as inputs of the model: random seeds, sample ids and capacity groups."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.samples import Batch
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.noise import hash_tokens
from pretrain.moe.tokens import TokenBatch
from pretrain.parallel.inputs import model_inputs
from tests.unit.pretrain.train_step_support import SMALL, make_batch, make_engine

CPU = torch.device("cpu")
CAPACITY = "moe={capacity_factor: 1, capacity_group_size: 2}"
PATCHES, TEXT_LENGTH, CONTEXT = 4, 5, 8


def make_model(*overrides: str) -> VisionLanguageModel:
    return make_engine(*SMALL, *overrides)[0].model


def batch_with_slots(*slots: int) -> Batch:
    """Pairs in these slots of the micro-batch; their samples have other ids."""
    slots_B = torch.tensor(slots, dtype=torch.int64)
    return make_batch(len(slots))._replace(slots=slots_B, ids=1000 + 7 * slots_B)


def groups_by_token(groups: list[int]) -> list[int]:
    """The patches of every pair, then the text tokens of every pair."""
    return [g for g in groups for _ in range(PATCHES)] + [
        g for g in groups for _ in range(TEXT_LENGTH)
    ]


def token_groups(*slots: int) -> TokenBatch:
    return model_inputs(batch_with_slots(*slots), make_model(CAPACITY), CPU).tokens


def test_tensors_are_those_of_the_batch() -> None:
    batch = batch_with_slots(0, 1, 2)
    inputs = model_inputs(batch, make_model(), CPU)
    assert torch.equal(inputs.images, batch.images)
    assert torch.equal(inputs.text_ids, batch.text_ids)
    assert torch.equal(inputs.text_lengths, batch.text_lengths)
    tokens = inputs.tokens
    assert torch.equal(tokens.text_positions, batch.text_positions)
    assert (tokens.num_pairs, tokens.num_patches, tokens.context_length) == (3, PATCHES, CONTEXT)


def test_step_seed_and_coactivation_are_passed_on() -> None:
    model, batch = make_model(), batch_with_slots(0, 1)
    tokens = model_inputs(batch, model, CPU, step_seed=123, coactivation=True).tokens
    assert (tokens.step_seed, tokens.coactivation) == (123, True)
    tokens = model_inputs(batch, model, CPU, step_seed=4).tokens
    assert (tokens.step_seed, tokens.coactivation) == (4, False)


def test_capacity_groups_follow_from_slots() -> None:
    """Pairs of skipped samples are missing; the others stay in the groups of their slots."""
    tokens = token_groups(0, 3, 4, 5)
    assert tokens.group_T is not None
    assert tokens.group_T.tolist() == groups_by_token([0, 1, 2, 2])
    assert tokens.num_groups == 3


@pytest.mark.parametrize(("slots", "num_groups"), [((), 0), ((0,), 1), ((1, 2), 2), ((7,), 4)])
def test_number_of_capacity_groups(slots: tuple[int, ...], num_groups: int) -> None:
    assert token_groups(*slots).num_groups == num_groups


def test_random_routing_depends_on_sample_ids() -> None:
    batch = batch_with_slots(1, 2, 6)
    tokens = model_inputs(batch, make_model("moe.routing=sampled"), CPU).tokens
    expected = hash_tokens(batch.ids, PATCHES, batch.text_positions, CONTEXT)
    assert tokens.token_hash_T is not None
    assert torch.equal(tokens.token_hash_T, expected)


def test_ids_and_slots_are_not_needed_without_random_routing_and_capacity() -> None:
    none = torch.empty(0, dtype=torch.int64)
    batch = batch_with_slots(0, 1)._replace(ids=none, slots=none)
    tokens = model_inputs(batch, make_model(), CPU).tokens
    assert (tokens.token_hash_T, tokens.group_T, tokens.num_groups) == (None, None, 0)


@pytest.mark.parametrize(
    ("override", "name"), [("moe.routing=sampled", "ids"), (CAPACITY, "slots")]
)
def test_missing_ids_or_slots_are_an_error(override: str, name: str) -> None:
    batch = batch_with_slots(0, 1)._replace(**{name: torch.empty(0, dtype=torch.int64)})
    with pytest.raises(DataError, match=f"a batch of 2 pairs has 0 {name}; .*moe.routing"):
        model_inputs(batch, make_model(override), CPU)
