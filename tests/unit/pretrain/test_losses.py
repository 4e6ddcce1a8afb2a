"""Contrastive loss: the sum of the ranks' terms equals the loss of the full similarity matrix.
Learning-rate schedules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.schema import ScheduleConfig
from pretrain.losses.contrastive import GatheredPairs, local_info_nce
from pretrain.optim.schedule import learning_rate


def full_matrix_loss(
    image: Tensor, text: Tensor, scale: Tensor, hashes: Tensor, mask: bool
) -> Tensor:
    """The CLIP loss of the full matrix, pair by pair."""
    losses = []
    for i in range(len(image)):
        keys = [j for j in range(len(image)) if j == i or not mask or hashes[j] != hashes[i]]
        for queries, targets in ((image, text), (text, image)):
            logits = scale * targets[keys] @ queries[i]
            losses.append(torch.logsumexp(logits, 0) - scale * targets[i] @ queries[i])
    return torch.stack(losses).sum() / (2 * len(image))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("pairs_per_rank", [[8], [4, 4], [3, 0, 4, 1]])
def test_local_terms_add_up_to_the_full_matrix(pairs_per_rank: list[int], mask: bool) -> None:
    torch.manual_seed(0)
    image, text = (
        F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    hashes = torch.tensor([1, 2, 3, 1, 5, 6, 2, 1])
    expected = full_matrix_loss(image, text, scale, hashes, mask)

    # Every rank sends the same number of rows; missing pairs are padding.
    rows = max(pairs_per_rank)
    valid_G = torch.cat([torch.arange(rows) < n for n in pairs_per_rank])
    valid_rows = valid_G.nonzero().flatten()

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(len(valid_G), *x.shape[1:]).index_copy(0, valid_rows, x)

    terms, start = [], 0
    for rank, n in enumerate(pairs_per_rank):
        local = slice(start, start + n)
        gathered = GatheredPairs(
            padded(image), padded(text), padded(hashes), valid_G, first_row=rank * rows
        )
        term = local_info_nce(
            image[local],
            text[local],
            hashes_B=hashes[local],
            gathered=gathered,
            logit_scale=scale,
            num_pairs=torch.tensor(8.0),
            mask_equal_captions=mask,
        )
        terms.append(term)
        start += n

    total = torch.stack(terms).sum()
    torch.testing.assert_close(total, expected)
    inputs = [image, text, scale]
    gradients = torch.autograd.grad(total, inputs)
    expected_gradients = torch.autograd.grad(expected, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_cosine_schedule() -> None:
    cosine = ScheduleConfig(kind="cosine", total_steps=110, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(0, cosine, 1.0) == pytest.approx(1 / 11)
    assert learning_rate(10, cosine, 1.0) == pytest.approx(1.0)
    assert learning_rate(60, cosine, 1.0) == pytest.approx(0.55)
    assert learning_rate(110, cosine, 1.0) == pytest.approx(0.1)
    rates = [learning_rate(step, cosine, 1.0) for step in range(110)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_wsd_schedule() -> None:
    wsd = ScheduleConfig(kind="wsd", total_steps=100, warmup_steps=0, decay_ratio=0.2)
    assert learning_rate(79, wsd, 1.0) == pytest.approx(1.0)
    assert learning_rate(90, wsd, 1.0) == pytest.approx(0.5)
    # `decay_ratio` is a fraction of the whole run, not of the steps after warm-up.
    long_warmup = ScheduleConfig(kind="wsd", total_steps=100, warmup_steps=50, decay_ratio=0.2)
    assert learning_rate(80, long_warmup, 1.0) == pytest.approx(1.0)
    assert learning_rate(90, long_warmup, 1.0) == pytest.approx(0.5)


def test_constant_schedule() -> None:
    constant = ScheduleConfig(kind="constant", total_steps=100, warmup_steps=5)
    assert learning_rate(99, constant, 2.0) == 2.0
