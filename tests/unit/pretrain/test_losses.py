"""Contrast as shares of ranks against the full matrix in float64; the schedule at its corners."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.schema import ScheduleConfig
from pretrain.losses.contrastive import info_nce_share
from pretrain.optim.schedule import learning_rate


def full_matrix(image: Tensor, text: Tensor, scale: Tensor, hashes: Tensor, mask: bool) -> Tensor:
    """The usual CLIP loss, pair by pair."""
    losses = []
    for i in range(len(image)):
        allowed = [j for j in range(len(image)) if j == i or not mask or hashes[j] != hashes[i]]
        for queries, answers in ((image, text), (text, image)):
            logits = scale * answers[allowed] @ queries[i]
            losses.append(torch.logsumexp(logits, 0) - scale * answers[i] @ queries[i])
    return torch.stack(losses).sum() / (2 * len(image))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("held", [[8], [4, 4], [3, 0, 4, 1]])
def test_shares_of_ranks_add_up_to_the_full_matrix(held: list[int], mask: bool) -> None:
    torch.manual_seed(0)
    image, text = (
        F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    hashes = torch.tensor([1, 2, 3, 1, 5, 6, 2, 1])
    true = full_matrix(image, text, scale, hashes, mask)

    rows = max(held)  # every rank sends as many rows; the missing ones are empty
    valid = torch.cat([torch.arange(rows) < n for n in held])
    places = valid.nonzero().flatten()

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(len(held) * rows, *x.shape[1:]).index_copy(0, places, x)

    shares, start = [], 0
    for rank, n in enumerate(held):
        mine = slice(start, start + n)
        shares.append(
            info_nce_share(
                image[mine],
                text[mine],
                padded(image),
                padded(text),
                hashes_B=hashes[mine],
                all_hashes_G=padded(hashes),
                valid_G=valid,
                first_row=rank * rows,
                logit_scale=scale,
                num_pairs=torch.tensor(8.0),
                mask_equal_captions=mask,
            )
        )
        start += n
    total = torch.stack(shares).sum()
    torch.testing.assert_close(total, true)
    inputs = [image, text, scale]
    for found, expected in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(true, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_learning_rate_at_its_corners() -> None:
    cosine = ScheduleConfig(kind="cosine", total_steps=110, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(0, cosine, 1.0) == pytest.approx(1 / 11)
    assert learning_rate(10, cosine, 1.0) == pytest.approx(1.0)
    assert learning_rate(60, cosine, 1.0) == pytest.approx(0.55)
    assert learning_rate(110, cosine, 1.0) == pytest.approx(0.1)
    wsd = ScheduleConfig(kind="wsd", total_steps=100, warmup_steps=0, decay_ratio=0.2)
    assert learning_rate(79, wsd, 1.0) == pytest.approx(1.0)
    assert learning_rate(90, wsd, 1.0) == pytest.approx(0.5)
    late = ScheduleConfig(
        kind="wsd", total_steps=100, warmup_steps=50, decay_ratio=0.2
    )  # of the run, not of the rest
    assert learning_rate(80, late, 1.0) == pytest.approx(1.0)
    assert learning_rate(90, late, 1.0) == pytest.approx(0.5)
    assert (
        learning_rate(99, ScheduleConfig(kind="constant", total_steps=100, warmup_steps=5), 2.0)
        == 2.0
    )
    rates = [learning_rate(step, cosine, 1.0) for step in range(110)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
