"""The stacked experts: grouped product against the loop, backend selection, and dispatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.dispatch import LocalDispatcher
from pretrain.moe.expert_loop import loop_swiglu
from pretrain.moe.experts import StackedExperts, grouped_swiglu
from pretrain.moe.routing import assign_experts, score_tokens
from tests.support.reference_moe import make_tokens


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [12, 0, 0, 0], [0, 0, 0, 7]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_equals_loop(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    rows = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
    weights = [
        torch.randn(4, *shape).mul(0.2).to(dtype).requires_grad_()
        for shape in ((24, 16), (16, 24), (24, 16))
    ]
    sizes = torch.tensor(counts)
    results = []
    for compute in (loop_swiglu, grouped_swiglu):
        y = compute(rows, sizes, *weights)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [rows, *weights])))
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("rows", "dtype", "width", "uses_loop"),
    [
        (0, torch.float32, 16, True),
        (127 * 4, torch.float32, 16, False),
        (128 * 4, torch.float32, 16, True),
        (8, torch.bfloat16, 16, False),
        (8, torch.float64, 16, True),
        (8, torch.float32, 12, True),
    ],
)
def test_automatic_backend_on_cpu(
    rows: int, dtype: torch.dtype, width: int, uses_loop: bool
) -> None:
    experts = StackedExperts(width, 24, 4)
    assert experts.uses_loop(torch.zeros(1, width, dtype=dtype), rows) == uses_loop
    assert StackedExperts(width, 24, 4, "loop").uses_loop(torch.zeros(1, width), 8)


class IdentityExperts(torch.nn.Module):
    """Experts that return their input."""

    def uses_loop(self, x: Tensor, rows: int) -> bool:
        return False

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        assert int(counts.sum()) == len(rows)
        return rows


@pytest.mark.parametrize("routing", ["top_k", "expert_choice"])
def test_dispatch_and_combine_with_identity_experts(routing: str) -> None:
    """With identity experts and weights that sum to 1, every token is returned unchanged."""
    torch.manual_seed(2)
    tokens, token_list = make_tokens([5, 8], 6)
    config = MoEConfig(num_experts=8, top_k=3, routing=routing)  # type: ignore[arg-type]
    scored = score_tokens(
        torch.randn(len(token_list), 8), config, tokens, block_index=0, noise=False
    )
    assigned = assign_experts(scored, config, tokens, None, block_index=0, noise=False)
    x = torch.randn(len(token_list), 4)
    y = LocalDispatcher().run(x, assigned, IdentityExperts(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(y[12:], x[12:])
    if routing == "top_k":
        torch.testing.assert_close(y, x)
