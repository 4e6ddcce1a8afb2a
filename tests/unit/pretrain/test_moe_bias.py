"""Expert biases: update rules, freezing, precision, and their effect on the load."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.bias import bias_rate, updated_bias
from pretrain.moe.layer import MoELayer
from tests.support.reference_moe import make_tokens

ASSIGNMENTS = torch.tensor([[6.0, 2.0, 4.0, 4.0], [0.0, 8.0, 1.0, 3.0]])


def bias_after_step(
    assignments: torch.Tensor = ASSIGNMENTS, moe: MoEConfig | None = None, **settings: object
) -> torch.Tensor:
    """Zero biases of four experts after one update with rate 0.5."""
    balance = BalanceConfig(**settings)  # type: ignore[arg-type]
    bias = torch.zeros(2 if balance.bias_per_modality else 1, 4)
    return updated_bias(bias, assignments, moe or MoEConfig(num_experts=4), balance, 0.5)


def test_sign_update() -> None:
    # The loads of both modalities add up to 6, 10, 5, 7; their mean is 7.
    assert bias_after_step(bias="sign").tolist() == [[0.5, -0.5, 0.5, 0.0]]
    assert bias_after_step(bias="sign", bias_per_modality=True).tolist() == [
        [-0.5, 0.5, 0, 0],
        [0.5, -0.5, 0.5, 0],
    ]


def test_zscore_update() -> None:
    updated = bias_after_step(bias="zscore", bias_per_modality=True)
    for row, load in zip(updated, ASSIGNMENTS, strict=True):
        torch.testing.assert_close(row, -0.5 * (load - load.mean()) / load.std(correction=0))
    assert not bias_after_step(torch.full((2, 4), 3.0), bias="zscore").any()
    assert not bias_after_step(torch.zeros(2, 4), bias="zscore", bias_per_modality=True).any()


def test_each_pool_has_its_own_mean_load() -> None:
    pools = MoEConfig(num_experts=4, pools="modality", top_k=1)
    assignments = torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    updated = bias_after_step(assignments, pools, bias="sign")
    assert updated.tolist() == [[-0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-2), (96, 1e-2), (97, 0.0), (99, 0.0)])
def test_biases_are_frozen_at_the_end(step: int, rate: float) -> None:
    sign = BalanceConfig(bias="sign", bias_rate=1e-2)
    never_frozen = BalanceConfig(bias="sign", bias_rate=1e-2, bias_freeze_ratio=0)
    assert bias_rate(sign, step, 100) == rate
    assert bias_rate(BalanceConfig(bias="none"), step, 100) == 0.0
    assert bias_rate(never_frozen, step, 100) == 1e-2


def test_casting_the_model_keeps_the_bias_in_float32() -> None:
    balance = BalanceConfig(bias="sign", bias_per_modality=True)
    layer = MoELayer(8, MoEConfig(num_experts=4), balance)
    assert layer.bias is not None
    layer.bias.value.fill_(0.1234567)
    layer.to(torch.bfloat16)
    assert layer.bias.value.dtype == torch.float32
    assert layer.bias.value.unique().tolist() == [pytest.approx(0.1234567, rel=1e-7)]
    assert "bias.value" in layer.state_dict()
    assert MoELayer(8, MoEConfig(num_experts=4)).bias is None


@pytest.mark.parametrize("pools", ["shared", "modality"])
@pytest.mark.parametrize("rule", ["sign", "zscore"])
def test_with_expert_choice_a_shared_bias_equals_the_text_bias(rule: str, pools: str) -> None:
    """Every expert takes the same number of patches, so only the text load deviates from its
    mean."""
    config = MoEConfig(
        num_experts=6,
        top_k=2,
        routing="expert_choice",
        pools=pools,  # type: ignore[arg-type]
    )
    tokens, token_list = make_tokens([5, 8, 3], 7)
    x_TD = torch.randn(len(token_list), 8)

    text_assignments, biases = [], []
    for per_modality in (False, True):
        torch.manual_seed(0)
        balance = BalanceConfig(bias=rule, bias_per_modality=per_modality)  # type: ignore[arg-type]
        layer = MoELayer(8, config, balance)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        assert layer.bias is not None
        for _ in range(4):
            stats = layer(x_TD, tokens)[1]
            layer.update_bias(stats.assignments_ME, 0.1)
        text_assignments.append(stats.assignments_ME[1])
        biases.append(layer.bias.value)

    torch.testing.assert_close(biases[0][0], biases[1][1])
    assert torch.equal(*text_assignments)
    assert biases[1][1].any() and not biases[1][0].any()


@pytest.mark.parametrize("rule", ["sign", "zscore"])
def test_biases_balance_a_skewed_router(rule: str) -> None:
    """The router is fixed and sends most tokens to one expert; only the biases can change that."""
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=1, expert_width=8)
    layer = MoELayer(8, config, BalanceConfig(bias=rule))  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, token_list = make_tokens([8] * 8, 24)
    x = torch.randn(len(token_list), 8)
    x[:, 0] = 1.0

    loads = []
    with torch.no_grad():
        layer.gate.weight[:, 0] = torch.tensor([2.0, 0.0, -1.0, 0.5])
        for _ in range(150):
            _, stats = layer(x, tokens)
            loads.append(stats.assignments_ME.sum(0))
            layer.update_bias(stats.assignments_ME, 0.01)

    assert float(loads[0].max()) > 2.5 * float(loads[0].float().mean())
    assert float(loads[-1].max()) < 1.25 * float(loads[-1].float().mean())
