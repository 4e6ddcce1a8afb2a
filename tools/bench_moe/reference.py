"""Correctness of each implementation: compared with a plain float32 layer with the same weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench_moe.implementations import Implementation, Weights, gradients_of

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error norm of a tensor, relative to the tensor's norm."""


class ReferenceOutput(NamedTuple):
    """Output and gradients of the reference layer, float32."""

    y_TD: Tensor
    grad_x_TD: Tensor
    gradients: Weights


def reference_layer(x_TD: Tensor, grad_TD: Tensor, weights: Weights, k: int) -> ReferenceOutput:
    """Compute the layer with a loop over the experts; gradients by autograd."""
    x_TD = x_TD.detach().float().requires_grad_()
    leaves = Weights(*(weight.detach().float().requires_grad_() for weight in weights))
    scores_TE = torch.softmax(F.linear(x_TD, leaves.router), dim=-1)
    top_scores_TK, ids_TK = scores_TE.topk(k, dim=-1)
    top_scores_TK = top_scores_TK / top_scores_TK.sum(dim=-1, keepdim=True)

    y_TD = torch.zeros_like(x_TD)
    experts = zip(leaves.w1.unbind(), leaves.w2.unbind(), leaves.w3.unbind(), strict=True)
    for expert, (w1, w2, w3) in enumerate(experts):
        rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
        x_nD = x_TD[rows]
        output_nD = F.linear(F.silu(F.linear(x_nD, w1)) * F.linear(x_nD, w3), w2)
        y_TD = y_TD.index_add(0, rows, output_nD * top_scores_TK[rows, slots].unsqueeze(1))
    y_TD.backward(grad_TD.float())
    assert x_TD.grad is not None
    return ReferenceOutput(y_TD.detach(), x_TD.grad, gradients_of(leaves))


def tensor_errors(
    implementation: Implementation, x_TD: Tensor, grad_TD: Tensor, reference: ReferenceOutput
) -> dict[str, float]:
    """Relative errors of the output and of each gradient; empty without comparable weights."""
    if implementation.gradients is None:
        return {}
    y_TD = implementation.run(x_TD, grad_TD)
    assert x_TD.grad is not None
    errors = {
        "output": relative_error(y_TD, reference.y_TD),
        "input gradient": relative_error(x_TD.grad, reference.grad_x_TD),
    }
    gradients = zip(Weights._fields, implementation.gradients(), reference.gradients, strict=True)
    for name, actual, expected in gradients:
        errors[f"gradient of {name}"] = relative_error(actual, expected)
    return errors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; infinite for NaN and for different shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().float(), expected.detach()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")
