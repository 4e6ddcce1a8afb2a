"""Routing replay: selections of a recorded model are used by another one, whose own are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel, valid_positions
from pretrain.parity.replay import RoutingReplay

PAIRS, COLUMNS = 6, 8
SMALL = ModelConfig(
    width=32,
    num_layers=3,
    num_heads=2,
    ffn_width=48,
    fusion_layer=2,
    image_size=16,
    patch_size=8,
    vocab_size=50,
    context_length=12,
    embed_dim=16,
    pool_heads=2,
)
ROUTINGS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "k=1": {"top_k": 1},
    "capacity": {"capacity_factor": 0.8, "capacity_group_size": 2},
    "sampled": {"routing": "sampled"},
    "expert_choice": {"routing": "expert_choice"},
    "pools": {"pools": "modality", "top_k": 1},
}


def make_model(seed: int, **moe: Any) -> VisionLanguageModel:
    torch.manual_seed(seed)
    config = MoEConfig(**({"num_experts": 4, "expert_width": 8} | moe))
    model = VisionLanguageModel(SMALL, config, BalanceConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def run(model: VisionLanguageModel, rows: slice = slice(None)) -> ModelOutput:
    """A forward pass in training mode on some pairs of a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    side = SMALL.image_size
    shape = (PAIRS, 3, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)[rows]
    ids = torch.randint(4, 40, (PAIRS, COLUMNS), generator=generator)[rows]
    lengths = torch.tensor([8, 3, 5, 2, 7, 4])[rows]
    tokens = model.token_batch(ids, valid_positions(lengths, COLUMNS))
    tokens = tokens.with_sample_ids(torch.arange(PAIRS)[rows])
    groups = (torch.arange(PAIRS)[rows] - (rows.start or 0)) // 2
    tokens = tokens.with_capacity_groups(groups, int(groups.max()) + 1)
    output: ModelOutput = model(images, ids, lengths, tokens)
    return output


def changed_assignments(first: Tensor, second: Tensor) -> int:
    return int((first - second).abs().sum())


@pytest.mark.parametrize("moe", ROUTINGS.values(), ids=ROUTINGS)
def test_other_weights_with_the_recorded_selections(moe: dict[str, Any]) -> None:
    reference, other = make_model(0, **moe), make_model(1, **moe)
    recorded = RoutingReplay(reference)
    expected = run(reference).router
    own = run(other).router
    assert changed_assignments(expected.assignments_ME, own.assignments_ME) > 0

    replay = RoutingReplay(other, recorded.selections)
    output = run(other)
    assert torch.equal(output.router.assignments_ME, expected.assignments_ME)
    # At least half of the changes of the counts: one assignment changes two of them.
    assert 2 * replay.pop_num_different() >= changed_assignments(
        expected.assignments_ME, own.assignments_ME
    )
    assert replay.pop_num_different() == 0
    # The weights of the selected experts are still those of the other model, with gradient.
    output.caption_loss_sum.backward()
    gates = [layer.gate.weight.grad for layer in other.moe_layers()]
    assert all(gate is not None and gate.abs().sum() > 0 for gate in gates)


@pytest.mark.parametrize("moe", ROUTINGS.values(), ids=ROUTINGS)
def test_equal_weights_select_the_same(moe: dict[str, Any]) -> None:
    reference, same = make_model(0, **moe), make_model(0, **moe)
    recorded = RoutingReplay(reference)
    expected = run(reference)
    replay = RoutingReplay(same, recorded.selections)
    actual = run(same)
    assert replay.pop_num_different() == 0
    assert torch.equal(actual.caption_loss_sum, expected.caption_loss_sum)


def test_micro_batches_find_their_tokens_and_repeated_passes_count_once() -> None:
    reference, other = make_model(0), make_model(1)
    recorded = RoutingReplay(reference)
    expected = run(reference).router.assignments_ME
    replay = RoutingReplay(other, recorded.selections)
    run(other)
    whole = replay.pop_num_different()

    parts = [run(other, rows).router.assignments_ME for rows in (slice(0, 2), slice(2, 6))]
    for rows in (slice(0, 2), slice(2, 6)):  # as in a second pass or a recomputation
        run(other, rows)
    assert torch.equal(parts[0] + parts[1], expected)
    assert replay.pop_num_different() == whole > 0


def test_micro_batches_are_recorded_together_and_once() -> None:
    reference = make_model(0)
    whole = RoutingReplay(reference)
    run(reference)
    parts = RoutingReplay(reference)
    for rows in (slice(2, 6), slice(0, 2), slice(0, 2)):
        run(reference, rows)
    assert parts.selections.keys() == whole.selections.keys()
    assert all(torch.equal(parts.selections[name], t) for name, t in whole.selections.items())


def test_steps_are_recorded_apart() -> None:
    reference = make_model(0)
    recorded = RoutingReplay(reference)
    run(reference)
    recorded.step = 1
    run(reference, slice(0, 2))
    assert {name.partition("/")[0] for name in recorded.selections} == {"0", "1"}
    # Step 0 has all tokens, step 1 only those of the first pairs.
    model = make_model(0)
    replay = RoutingReplay(model, recorded.selections)
    run(model)
    assert replay.pop_num_different() == 0
    replay.step = 1
    run(model, slice(0, 2))
    assert replay.pop_num_different() == 0
    with pytest.raises(RuntimeError, match="1/0/top_k"):
        run(model)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([[0, 1], [2, 3]], 0),
        ([[0, 2], [2, 3]], 1),
        ([[2, 3], [0, 1]], 4),
        ([[0, 0], [2, 3]], 1),  # an expert twice instead of two
        ([[1, 0], [2, 3]], 1),  # the order decides which one is first
        ([[0], [2]], 2),  # too few
    ],
)
def test_selections_that_differ_are_counted(own: list[list[int]], expected: int) -> None:
    hashes = torch.tensor([5, 9])
    recorded = {"0/0/top_k/hash": hashes, "0/0/top_k/indices": torch.tensor([[0, 1], [2, 3]])}
    model = make_model(0)
    replay = RoutingReplay(model, recorded)
    (layer, *_) = model.moe_layers()
    assert layer.replace_selection is not None
    selected = layer.replace_selection("top_k", torch.tensor(own), hashes)
    assert selected.tolist() == [[0, 1], [2, 3]]
    assert replay.pop_num_different() == expected


def test_a_token_that_the_reference_does_not_have() -> None:
    reference, other = make_model(0), make_model(0)
    recorded = RoutingReplay(reference)
    run(reference, slice(0, 2))
    RoutingReplay(other, recorded.selections)
    with pytest.raises(RuntimeError, match="0/0/top_k"):
        run(other)
