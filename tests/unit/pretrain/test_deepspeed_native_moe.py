"""DeepSpeed's MoE layer in our model: unsupported settings, names, and parity with `MoELayer`.

tests/distributed/test_deepspeed_layer_parity.py compares training steps on several processes, and
tests/e2e/test_deepspeed_layer_run.py trains a whole run.
"""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.validate import check_run, problems
from pretrain.moe.layer import MoELayer
from pretrain.moe.token_metadata import TokenMetadata
from pretrain.parallel.deepspeed_config import zero_stage_of
from pretrain.parallel.layout import Layout

DEEPSPEED_LAYER = "moe.backend=deepspeed"
UNSUPPORTED = [
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


def test_supported_run() -> None:
    assert problems(load_run("tiny", [DEEPSPEED_LAYER]), 1, zero_stage=1) == []


def test_all_unsupported_settings_are_in_one_error() -> None:
    run = load_run("tiny", [DEEPSPEED_LAYER, *UNSUPPORTED])
    with pytest.raises(ConfigError) as caught:
        check_run(run, 1, training=False, zero_stage=3)
    text = str(caught.value)
    for name in [*(setting.partition("=")[0] for setting in UNSUPPORTED), "ZeRO stage 3"]:
        assert name in text
    assert f"{len(UNSUPPORTED) + 1} problems" in text
    builtin = load_run("tiny", UNSUPPORTED)
    assert not problems(builtin, 1, zero_stage=3), "the builtin layer supports all of them"


def test_plain_engine_is_rejected() -> None:
    (problem,) = problems(load_run("tiny", [DEEPSPEED_LAYER, "parallel.engine=plain"]), 1)
    assert "parallel.engine is plain" in problem


def test_zero_stage_is_read_only_for_the_deepspeed_layer() -> None:
    assert zero_stage_of(load_run("tiny", [DEEPSPEED_LAYER, "parallel.deepspeed=zero3"])) == 3
    assert zero_stage_of(load_run("tiny", ["parallel.deepspeed=no-such-profile"])) is None
    with pytest.raises(ConfigError, match="no-such-profile"):
        zero_stage_of(load_run("tiny", [DEEPSPEED_LAYER, "parallel.deepspeed=no-such-profile"]))


def test_canonical_names() -> None:
    from pretrain.parallel.deepspeed_native_moe import canonical_name

    prefix = "blocks.3.ffn.native.deepspeed_moe."
    assert canonical_name(prefix + "experts.deepspeed_experts.2.w1", 4) == (
        "blocks.3.ffn.experts.w1",
        6,
    )
    assert canonical_name(prefix + "gate.wg.weight", 4) == ("blocks.3.ffn.gate.weight", None)
    assert canonical_name("blocks.3.ffn.shared.down", 4) is None


def test_layout_of_checkpoints_names_the_layer() -> None:
    fields = {
        "world_size": 1,
        "expert_parallel_size": 1,
        "zero_stage": 1,
        "precision": "fp32",
        "num_experts": 8,
    }
    assert Layout(**fields).to_json() == fields | {"expert_layer": "builtin"}
    native = Layout(**fields, expert_layer="deepspeed")
    assert native.to_json() == fields | {"expert_layer": "deepspeed"}
    assert Layout(**native.to_json()) == native


@pytest.mark.parametrize(("k", "shared"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("captions", [True, False])
def test_parity_with_the_builtin_layer(k: int, shared: int, captions: bool) -> None:
    from pretrain.parallel.deepspeed_native_moe import DeepSpeedNativeMoELayer

    torch.manual_seed(0)
    config = MoEConfig(num_experts=5, top_k=k, expert_width=12, shared_experts=shared)
    builtin = MoELayer(16, config)
    for parameter in builtin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    native = DeepSpeedNativeMoELayer(16, config, BalanceConfig(), block_index=1)
    with torch.no_grad():
        for value, parameter in parameter_pairs(builtin, native):
            parameter.copy_(value)

    lengths = [3, 0, 5] if captions else []
    positions = torch.tensor(
        [b * 6 + s for b, n in enumerate(lengths) for s in range(n)], dtype=torch.int64
    )
    tokens = TokenMetadata(3, 4, 6, positions, coactivation=True)
    x_TD = torch.randn(12 + len(positions), 16)
    outputs = []
    for layer in (builtin, native):
        x = x_TD.clone().requires_grad_()
        y, stats = layer(x, tokens)
        z_loss = (stats.z_sum_M * torch.tensor([1.0, 2.0])).sum()
        (y.square().sum() + z_loss + stats.prob_sum_ME[0, 0]).backward()
        assert x.grad is not None
        outputs.append((y, x.grad, stats))

    expected, actual = outputs
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)
    for statistic, expected_statistic in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(statistic, expected_statistic)
    for gradient, parameter in parameter_pairs(builtin, native, gradients=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def parameter_pairs(
    builtin: MoELayer, native: MoELayer, *, gradients: bool = False
) -> list[tuple[torch.Tensor, torch.nn.Parameter]]:
    """Each parameter of `native` with the value or gradient of its counterpart in `builtin`."""
    from pretrain.parallel.deepspeed_native_moe import canonical_name

    parameters = dict(builtin.named_parameters())
    pairs = []
    for name, parameter in native.named_parameters():
        canonical = canonical_name("ffn." + name, 0)
        base, expert = canonical or (name, None)
        counterpart = parameters[base.removeprefix("ffn.")]
        value = counterpart.grad if gradients else counterpart.detach()
        assert value is not None
        pairs.append((value if expert is None else value[expert : expert + 1], parameter))
    return pairs


def test_rank_without_tokens() -> None:
    from pretrain.parallel.deepspeed_native_moe import DeepSpeedNativeMoELayer

    layer = DeepSpeedNativeMoELayer(
        16, MoEConfig(num_experts=4, expert_width=8), BalanceConfig(), block_index=0
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.zeros(0, 16, requires_grad=True)
    y_TD, stats = layer(x_TD, TokenMetadata(0, 4, 6, torch.zeros(0, dtype=torch.int64)))
    (y_TD.sum() + stats.z_sum_M.sum()).backward()
    assert y_TD.shape == (0, 16) and int(stats.assignments_ME.sum()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
