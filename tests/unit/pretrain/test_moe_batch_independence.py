"""A token's output does not depend on the rest of the batch: in evaluation mode not at all, during
training only on its capacity group."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.moe_layers import LENGTHS, PATCHES, WIDTH, make_layer, parametrize_options
from tests.support.reference_moe import make_tokens


@parametrize_options()
def test_evaluation_is_deterministic_dropless_and_batch_independent(
    settings: dict[str, Any],
) -> None:
    layer = make_layer(**settings).eval()
    tokens, token_list = make_tokens(LENGTHS, PATCHES, groups=[0, 0, 0, 0], step_seed=1)
    x = torch.randn(len(token_list), WIDTH, dtype=torch.float64)
    y, stats = layer(x, tokens._replace(token_hash_T=None, group_T=None))
    assert torch.equal(stats.kept_ME, stats.assignments_ME)

    for pair in range(4):
        rows = [i for i, token in enumerate(token_list) if token.pair == pair]
        single, _ = make_tokens([LENGTHS[pair]], PATCHES, step_seed=2)
        torch.testing.assert_close(layer(x[rows], single)[0], y[rows], atol=1e-11, rtol=1e-9)

    order = [2, 0, 3, 1]
    shuffled, shuffled_list = make_tokens([LENGTHS[b] for b in order], PATCHES)
    original_rows = {(t.pair, t.modality, t.position): i for i, t in enumerate(token_list)}
    rows = [original_rows[order[t.pair], t.modality, t.position] for t in shuffled_list]
    torch.testing.assert_close(layer(x[rows], shuffled)[0], y[rows], atol=1e-11, rtol=1e-9)


@parametrize_options()
def test_training_is_independent_of_other_capacity_groups(settings: dict[str, Any]) -> None:
    """Two micro-batches of one group each give the same as one micro-batch with both groups."""
    layer = make_layer(**settings)
    ids = [50, 60, 70, 80]
    tokens, token_list = make_tokens(LENGTHS, PATCHES, ids=ids, groups=[0, 0, 1, 1], step_seed=9)
    x = torch.randn(len(token_list), WIDTH, dtype=torch.float64)
    y, stats = layer(x, tokens)

    kept = torch.zeros_like(stats.kept_ME)
    for pairs in ([0, 1], [2, 3]):
        rows = [i for i, token in enumerate(token_list) if token.pair in pairs]
        half, _ = make_tokens(
            [LENGTHS[b] for b in pairs], PATCHES, ids=[ids[b] for b in pairs], step_seed=9
        )
        y_half, half_stats = layer(x[rows], half)
        torch.testing.assert_close(y_half, y[rows], atol=1e-11, rtol=1e-9)
        kept += half_stats.kept_ME
    assert torch.equal(kept, stats.kept_ME)
