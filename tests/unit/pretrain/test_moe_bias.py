"""Biases of the choice: how they move, when they rest, and that no cast rounds them."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.bias import bias_rate, moved_bias
from pretrain.moe.layer import MoELayer

CHOICES = torch.tensor([[6.0, 2.0, 4.0, 4.0], [0.0, 8.0, 1.0, 3.0]])


def moved(
    choices: torch.Tensor = CHOICES, moe: MoEConfig | None = None, **settings: object
) -> torch.Tensor:
    balance = BalanceConfig(**settings)  # type: ignore[arg-type]
    bias = torch.zeros(2 if balance.bias_per_modality else 1, 4)
    return moved_bias(bias, choices, moe or MoEConfig(num_experts=4), balance, 0.5)


def test_sign_moves_by_the_rate_against_the_load() -> None:
    # Loads 6, 10, 5, 7 of both modalities together; 7 is the mean.
    assert moved(bias="sign").tolist() == [[0.5, -0.5, 0.5, 0.0]]
    assert moved(bias="sign", bias_per_modality=True).tolist() == [
        [-0.5, 0.5, 0, 0],
        [0.5, -0.5, 0.5, 0],
    ]


def test_zscore_moves_by_how_far_off() -> None:
    found = moved(bias="zscore", bias_per_modality=True)
    for row, load in zip(found, CHOICES, strict=True):
        torch.testing.assert_close(row, -0.5 * (load - load.mean()) / load.std(correction=0))
    assert not moved(torch.full((2, 4), 3.0), bias="zscore").any()
    assert not moved(torch.zeros(2, 4), bias="zscore", bias_per_modality=True).any()


def test_pools_are_judged_by_themselves() -> None:
    pools = MoEConfig(num_experts=4, pools="modality", top_k=1)
    choices = torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    assert moved(choices, pools, bias="sign").tolist() == [[-0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-2), (96, 1e-2), (97, 0.0), (99, 0.0)])
def test_biases_rest_in_the_last_part(step: int, rate: float) -> None:
    assert bias_rate(BalanceConfig(bias="sign", bias_rate=1e-2), step, 100) == rate
    assert bias_rate(BalanceConfig(bias="none"), step, 100) == 0.0
    assert (
        bias_rate(BalanceConfig(bias="sign", bias_rate=1e-2, bias_freeze_ratio=0), step, 100)
        == 1e-2
    )


def test_a_cast_of_the_model_leaves_the_bias_alone() -> None:
    layer = MoELayer(
        8, MoEConfig(num_experts=4), BalanceConfig(bias="sign", bias_per_modality=True)
    )
    assert layer.bias is not None
    layer.bias.value.fill_(0.1234567)
    layer.to(torch.bfloat16)
    assert layer.bias.value.dtype == torch.float32
    assert layer.bias.value.unique().tolist() == [pytest.approx(0.1234567, rel=1e-7)]
    assert "bias.value" in layer.state_dict()
    assert MoELayer(8, MoEConfig(num_experts=4)).bias is None


@pytest.mark.parametrize("pools", ["shared", "modality"])
@pytest.mark.parametrize("rule", ["sign", "zscore"])
def test_where_experts_choose_patches_one_bias_is_that_of_the_text(rule: str, pools: str) -> None:
    """Every expert takes as many patches as the others, so that only the text's load is off its
    mean."""
    from tests.support.slow_moe import make_tokens

    config = MoEConfig(num_experts=6, top_k=2, routing="expert_choice", pools=pools)  # type: ignore[arg-type]
    tokens, listed = make_tokens([5, 8, 3], 7)
    x_TD, text_choices, biases = torch.randn(len(listed), 8), [], []
    for per_modality in (False, True):
        torch.manual_seed(0)
        layer = MoELayer(8, config, BalanceConfig(bias=rule, bias_per_modality=per_modality))  # type: ignore[arg-type]
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        assert layer.bias is not None
        for _ in range(4):
            stats = layer(x_TD, tokens)[1]
            layer.move_bias(stats.choices_ME, 0.1)
        text_choices.append(stats.choices_ME[1])
        biases.append(layer.bias.value)
    torch.testing.assert_close(biases[0][0], biases[1][1])
    assert torch.equal(*text_choices)
    assert biases[1][1].any() and not biases[1][0].any()


def test_biases_even_out_a_lopsided_router() -> None:
    """A fixed router that would send nearly everything to one expert; only the biases may change
    that."""
    from tests.support.slow_moe import make_tokens

    for rule, rate in (("sign", 0.01), ("zscore", 0.01)):
        torch.manual_seed(0)
        layer = MoELayer(
            8,
            MoEConfig(num_experts=4, top_k=1, expert_width=8),
            BalanceConfig(bias=rule),
        )  # type: ignore[arg-type]
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tokens, listed = make_tokens([8] * 8, 24)
        x = torch.randn(len(listed), 8)
        x[:, 0] = 1.0
        with torch.no_grad():
            layer.gate.weight[:, 0] = torch.tensor([2.0, 0.0, -1.0, 0.5])
            loads = []
            for _ in range(150):
                _, stats = layer(x, tokens)
                loads.append(stats.choices_ME.sum(0))
                layer.move_bias(stats.choices_ME, rate)
        assert float(loads[0].max()) > 2.5 * float(loads[0].float().mean())
        assert float(loads[-1].max()) < 1.25 * float(loads[-1].float().mean()), rule
