"""Router precision (float32 for any dtype of the activations), and separation of expert pools."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from pretrain.config.experts import MoEConfig
from pretrain.moe.layer import MoELayer
from tests.support.reference_moe import make_tokens, reference_logits

WIDTH = 64
LENGTHS, PATCHES = [3, 5, 1, 4], 4


def make_layer(**settings: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, MoEConfig(expert_width=8, **settings), fused=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def autocast_if(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


@pytest.mark.parametrize("mixed", ["bfloat16", "autocast"])
def test_router_computes_in_float32(mixed: str) -> None:
    """The products too, not only the result: bfloat16 products would be off by 1e-3."""
    layer, x_TD = make_layer(num_experts=8), torch.randn(200, WIDTH)
    if mixed == "bfloat16":
        layer, x_TD = layer.bfloat16(), x_TD.bfloat16()
    with autocast_if(mixed == "autocast"):
        logits_TE, l1 = layer.gate(x_TD), layer.gate()
    weight = layer.gate.weight.double()
    assert logits_TE.dtype == l1.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), x_TD.double() @ weight.T, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(l1.double(), weight.abs().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mixed", ["bfloat16", "autocast"])
def test_caption_gate_and_scores_compute_in_float32(mixed: str) -> None:
    layer = make_layer(num_experts=4, router_input="caption")
    tokens, token_list = make_tokens(LENGTHS, PATCHES)
    x_TD = torch.randn(len(token_list), WIDTH)
    if mixed == "bfloat16":
        layer, x_TD = layer.bfloat16(), x_TD.bfloat16()
    exact_layer = copy.deepcopy(layer).double()
    with autocast_if(mixed == "autocast"):
        logits_TE, scored, routing = layer.route(x_TD, tokens)
    exact_TE = torch.stack(reference_logits(exact_layer, x_TD.double(), token_list))
    exact_scores_TE = torch.softmax(exact_TE, 1)

    assert {t.dtype for t in (logits_TE, scored.scores_TE, routing.weights_N)} == {torch.float32}
    torch.testing.assert_close(logits_TE.double(), exact_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.scores_TE.double(), exact_scores_TE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ["top_k", "noisy_top_k", "sampled", "expert_choice"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_confident_router_stays_in_the_pool(routing: str, score_func: str) -> None:
    """Scores inside a token's pool may underflow to 0, the score of experts outside the pool."""
    layer = make_layer(
        num_experts=6, top_k=2, pools="modality", routing=routing, score_func=score_func
    )
    with torch.no_grad():
        layer.gate.weight *= 300
    tokens, token_list = make_tokens([8] * 8, PATCHES, step_seed=3)
    _, scored, _ = layer.route(torch.randn(len(token_list), WIDTH), tokens)
    in_pool = scored.logits_TE > float("-inf")
    assert (scored.scores_TE[in_pool] == 0).sum() > 50

    _, stats = layer(torch.randn(len(token_list), WIDTH), tokens)
    for counts_ME in (stats.assignments_ME, stats.kept_ME, stats.top1_ME):
        assert not counts_ME[0, 3:].any() and not counts_ME[1, :3].any()
    assert stats.top1_ME.sum(dim=1).tolist() == [PATCHES * 8, 8 * 8]
