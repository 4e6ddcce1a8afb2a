"""Are the answers right? Each arm against the layer written plainly, in float32, with the same
weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench_moe.arms import Arm, Weights, gradients_of

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of a tensor, as a share of its norm."""


class Truth(NamedTuple):
    """What a layer should give, float32."""

    y_TD: Tensor
    grad_x_TD: Tensor
    gradients: Weights


def plain_layer(x_TD: Tensor, grad_TD: Tensor, weights: Weights, k: int) -> Truth:
    """The layer without tricks: a loop over the experts, gradients by autograd."""
    x_TD = x_TD.detach().float().requires_grad_()
    leaves = Weights(*(weight.detach().float().requires_grad_() for weight in weights))
    scores_TE = torch.softmax(F.linear(x_TD, leaves.router), dim=-1)
    best_TK, ids_TK = scores_TE.topk(k, dim=-1)
    best_TK = best_TK / best_TK.sum(dim=-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    experts = zip(leaves.w1.unbind(), leaves.w2.unbind(), leaves.w3.unbind(), strict=True)
    for expert, (w1, w2, w3) in enumerate(experts):
        rows, place = (ids_TK == expert).nonzero(as_tuple=True)
        x_nD = x_TD[rows]
        answers_nD = F.linear(F.silu(F.linear(x_nD, w1)) * F.linear(x_nD, w3), w2)
        y_TD = y_TD.index_add(0, rows, answers_nD * best_TK[rows, place].unsqueeze(1))
    y_TD.backward(grad_TD.float())
    assert x_TD.grad is not None
    return Truth(y_TD.detach(), x_TD.grad, gradients_of(leaves))


def differences(arm: Arm, x_TD: Tensor, grad_TD: Tensor, truth: Truth) -> dict[str, float]:
    """How far an arm is off, by tensor; empty for an arm that computes something else."""
    if arm.gradients is None:
        return {}
    y_TD = arm.run(x_TD, grad_TD)
    assert x_TD.grad is not None
    found = {
        "answers": off(y_TD, truth.y_TD),
        "gradient of the tokens": off(x_TD.grad, truth.grad_x_TD),
    }
    for name, mine, true in zip(Weights._fields, arm.gradients(), truth.gradients, strict=True):
        found[f"gradient of {name}"] = off(mine, true)
    return found


def off(mine: Tensor, true: Tensor) -> float:
    """|mine - true| / |true|; infinite where anything is no number."""
    if mine.shape != true.shape:
        return float("inf")
    mine, true = mine.detach().float(), true.detach()
    difference = float((mine - true).norm() / true.norm().clamp(min=1e-30))
    return difference if difference == difference else float("inf")
