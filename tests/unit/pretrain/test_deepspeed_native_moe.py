"""DeepSpeed's own MoE layer in our trunk: what it refuses, and names. That it computes what ours
does is tested by tests/distributed/test_deepspeed_layer_equals_ours.py, and a whole run by
tests/e2e/test_deepspeed_layer_run.py."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.validate import check, problems
from pretrain.moe.layer import MoELayer
from pretrain.moe.tokens import RouterTokens
from pretrain.parallel.deepspeed_config import zero_stage_of
from pretrain.parallel.layout import Layout

NATIVE = "moe.backend=deepspeed"


def test_the_usual_run_may_use_it() -> None:
    assert problems(load_run("tiny", [NATIVE]), 1, zero_stage=1) == []


def test_everything_it_cannot_do_is_told_at_once() -> None:
    words = [
        "moe.score_func=sigmoid",
        "moe.temperature=2",
        "moe.norm_topk_prob=false",
        "moe.router_input=caption",
        "moe.routing=sampled",
        "moe.capacity_factor=1.25",
        "moe.pools=modality",
        "balance.bias=sign",
        "balance.expert_l1_weight=1e-5",
        "balance.router_l1_weight=1e-5",
    ]
    run = load_run("tiny", [NATIVE, *words])
    with pytest.raises(ConfigError) as told:
        check(run, 1, training=False, zero_stage=3)
    text = str(told.value)
    for name in [*(word.partition("=")[0] for word in words), "ZeRO stage 3"]:
        assert name in text
    assert text.count("does not know") == len(words) + 1
    ours = load_run("tiny", words)
    assert not problems(ours, 1, zero_stage=3), "ours can"


def test_one_process_without_deepspeed_is_refused() -> None:
    assert [
        "parallel.engine is plain" in said
        for said in problems(load_run("tiny", [NATIVE, "parallel.engine=plain"]), 1)
    ] == [True]


def test_the_zero_stage_is_read_only_where_it_matters() -> None:
    assert zero_stage_of(load_run("tiny", [NATIVE, "parallel.deepspeed=zero3"])) == 3
    assert zero_stage_of(load_run("tiny", ["parallel.deepspeed=no-such-profile"])) is None
    with pytest.raises(ConfigError, match="no-such-profile"):
        zero_stage_of(load_run("tiny", [NATIVE, "parallel.deepspeed=no-such-profile"]))


def test_names_are_ours() -> None:
    from pretrain.parallel.deepspeed_native_moe import our_name

    native = "blocks.3.ffn.native.deepspeed_moe."
    assert our_name(native + "experts.deepspeed_experts.2.w1", 4) == ("blocks.3.ffn.experts.w1", 6)
    assert our_name(native + "gate.wg.weight", 4) == ("blocks.3.ffn.gate.weight", None)
    assert our_name("blocks.3.ffn.shared.down", 4) is None


def test_its_checkpoints_have_their_own_layout() -> None:
    facts = {
        "world_size": 1,
        "expert_parallel_size": 1,
        "zero_stage": 1,
        "precision": "fp32",
        "num_experts": 8,
    }
    assert Layout(**facts).to_json() == facts  # as older checkpoints say
    theirs = Layout(**facts, expert_layer="deepspeed")
    assert theirs.to_json() == facts | {"expert_layer": "deepspeed"}
    assert Layout(**theirs.to_json()) == theirs


@pytest.mark.parametrize(("k", "shared"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("captions", [True, False])
def test_it_is_the_same_layer(k: int, shared: int, captions: bool) -> None:
    from pretrain.parallel.deepspeed_native_moe import DeepSpeedNativeMoELayer, our_name

    torch.manual_seed(0)
    config = MoEConfig(num_experts=5, top_k=k, expert_width=12, shared_experts=shared)
    ours = MoELayer(16, config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = DeepSpeedNativeMoELayer(16, config, BalanceConfig(), block=1)
    copied = dict(ours.named_parameters())
    homes = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            found = our_name("ffn." + name, 0)
            base, expert = (found[0].removeprefix("ffn."), found[1]) if found else (name, None)
            homes[name] = (base, expert)
            parameter.copy_(copied[base] if expert is None else copied[base][expert : expert + 1])
    lengths = [3, 0, 5] if captions else []
    positions = torch.tensor(
        [b * 6 + s for b, n in enumerate(lengths) for s in range(n)], dtype=torch.int64
    )
    tokens = RouterTokens(3, 4, 6, positions, coactivation=True)
    x_TD = torch.randn(12 + len(positions), 16)
    answers = []
    for layer in (ours, theirs):
        x = x_TD.clone().requires_grad_()
        y, stats = layer(x, tokens)
        (
            y.square().sum()
            + (stats.z_sum_M * torch.tensor([1.0, 2.0])).sum()
            + stats.prob_sum_ME[0, 0]
        ).backward()
        assert x.grad is not None
        answers.append((y, x.grad, stats))
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers[1][1], answers[0][1], rtol=1e-5, atol=1e-5)
    for mine, true in zip(answers[1][2], answers[0][2], strict=True):
        torch.testing.assert_close(mine, true)
    for name, parameter in theirs.named_parameters():
        base, expert = homes[name]
        gradient = copied[base].grad
        assert gradient is not None and parameter.grad is not None
        true = gradient if expert is None else gradient[expert : expert + 1]
        torch.testing.assert_close(parameter.grad, true, rtol=1e-4, atol=1e-5)


def test_a_rank_without_tokens_takes_part() -> None:
    from pretrain.parallel.deepspeed_native_moe import DeepSpeedNativeMoELayer

    layer = DeepSpeedNativeMoELayer(
        16, MoEConfig(num_experts=4, expert_width=8), BalanceConfig(), block=0
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.zeros(0, 16, requires_grad=True)
    y_TD, stats = layer(x_TD, RouterTokens(0, 4, 6, torch.zeros(0, dtype=torch.int64)))
    (y_TD.sum() + stats.z_sum_M.sum()).backward()
    assert y_TD.shape == (0, 16) and int(stats.choices_ME.sum()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
