"""What routers compute: in float32 whatever surrounds them, and never an expert of another pool."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from pretrain.config.experts import MoEConfig
from pretrain.moe.layer import MoELayer
from tests.support.slow_moe import make_tokens, slow_logits

WIDTH = 64
LENGTHS, PATCHES = [3, 5, 1, 4], 4


def make_layer(**settings: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, MoEConfig(expert_width=8, **settings), fused=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("mixed", ["bfloat16", "autocast"])
def test_the_router_computes_in_float32(mixed: str) -> None:
    """Not only its result is of that type: products rounded to bfloat16 would be off by 1e-3."""
    layer, x_TD = make_layer(num_experts=8), torch.randn(200, WIDTH)
    if mixed == "bfloat16":
        layer, x_TD = layer.bfloat16(), x_TD.bfloat16()
    context = (
        torch.autocast("cpu", torch.bfloat16) if mixed == "autocast" else contextlib.nullcontext()
    )
    with context:
        logits_TE, absolute = layer.gate(x_TD), layer.gate()
    weight = layer.gate.weight.double()
    assert logits_TE.dtype == absolute.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), x_TD.double() @ weight.T, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(absolute.double(), weight.abs().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mixed", ["bfloat16", "autocast"])
def test_so_does_the_caption_gate_and_all_that_is_decided(mixed: str) -> None:
    layer = make_layer(num_experts=4, router_input="caption")
    tokens, listed = make_tokens(LENGTHS, PATCHES)
    x_TD = torch.randn(len(listed), WIDTH)
    if mixed == "bfloat16":
        layer, x_TD = layer.bfloat16(), x_TD.bfloat16()
    exact = copy.deepcopy(layer).double()
    context = (
        torch.autocast("cpu", torch.bfloat16) if mixed == "autocast" else contextlib.nullcontext()
    )
    with context:
        logits_TE, scored, routing = layer.route(x_TD, tokens)
    true_TE = torch.stack(slow_logits(exact, x_TD.double(), listed))
    assert {t.dtype for t in (logits_TE, scored.scores_TE, routing.weights_N)} == {torch.float32}
    torch.testing.assert_close(logits_TE.double(), true_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        scored.scores_TE.double(), torch.softmax(true_TE, 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("choice", ["top_k", "noisy_top_k", "sampled", "expert_choice"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_sure_router_keeps_to_the_pool(choice: str, score: str) -> None:
    """Scores of a token's own pool may underflow to 0, which is what those of the other pool
    are."""
    layer = make_layer(num_experts=6, top_k=2, pools="modality", routing=choice, score_func=score)
    with torch.no_grad():
        layer.gate.weight *= 300
    tokens, listed = make_tokens([8] * 8, PATCHES, draw=3)
    _, scored, _ = layer.route(torch.randn(len(listed), WIDTH), tokens)
    own = scored.logits_TE > float("-inf")
    assert (scored.scores_TE[own] == 0).sum() > 50
    _, stats = layer(torch.randn(len(listed), WIDTH), tokens)
    for counts_ME in (stats.choices_ME, stats.kept_ME, stats.first_ME):
        assert not counts_ME[0, 3:].any() and not counts_ME[1, :3].any()
    assert stats.first_ME.sum(dim=1).tolist() == [PATCHES * 8, 8 * 8]
