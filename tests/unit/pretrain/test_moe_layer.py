"""The sparse layer against one written slowly: output, gradients, statistics, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.dispatch import LocalDispatcher
from pretrain.moe.experts import StackedExperts, grouped_swiglu
from pretrain.moe.layer import MoELayer
from pretrain.moe.routing import choose, count_ids, score_tokens
from pretrain.moe.statistics import GRADIENT_FIELDS
from tests.support.slow_moe import make_tokens, slow_logits, slow_moe, slow_statistics

WIDTH = 16
LENGTHS, PATCHES = [3, 5, 1, 4], 4


class ExactRouter(torch.nn.Module):
    """The router in float64, so that a layer in float64 can be compared to the last digits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x_TD: Tensor | None = None) -> Tensor:
        return self.weight.abs().sum() if x_TD is None else x_TD @ self.weight.t()


def make_layer(balance: dict[str, Any] | None = None, **settings: Any) -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig(**({"expert_width": 24} | settings))
    layer = MoELayer(WIDTH, config, BalanceConfig(**(balance or {})), block=3, fused=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = layer.double()
    layer.gate = ExactRouter(layer.gate.weight)  # type: ignore[assignment]
    if layer.bias is not None:
        layer.bias.value.normal_(std=0.1)
    return layer


OPTIONS: dict[str, dict[str, Any]] = {
    "top-1": {"num_experts": 4, "top_k": 1},
    "top-2, no shared expert": {"num_experts": 8, "top_k": 2, "shared_experts": 0},
    "every expert, raw weights": {"num_experts": 6, "top_k": 6, "norm_topk_prob": False},
    "sigmoid": {
        "num_experts": 8,
        "top_k": 3,
        "score_func": "sigmoid",
        "shared_experts": 2,
        "temperature": 2.0,
    },
    "sampled": {"num_experts": 8, "top_k": 2, "routing": "sampled"},
    "sampled sigmoid": {
        "num_experts": 8,
        "top_k": 2,
        "routing": "sampled",
        "score_func": "sigmoid",
    },
    "noisy": {
        "num_experts": 8,
        "top_k": 2,
        "routing": "noisy_top_k",
        "noise_std": 4.0,
        "temperature": 0.5,
    },
    "noisy in pools": {
        "num_experts": 6,
        "top_k": 2,
        "routing": "noisy_top_k",
        "pools": "modality",
    },
    "experts choose": {"num_experts": 4, "top_k": 2, "routing": "expert_choice"},
    "experts choose in pools": {
        "num_experts": 6,
        "top_k": 2,
        "routing": "expert_choice",
        "pools": "modality",
    },
    "pools": {"num_experts": 7, "top_k": 2, "pools": "modality", "image_experts": 5},
    "pools with sigmoid": {
        "num_experts": 6,
        "top_k": 2,
        "pools": "modality",
        "score_func": "sigmoid",
        "temperature": 1.7,
    },
    "capacity": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.75},
    "capacity by chance": {
        "num_experts": 4,
        "top_k": 2,
        "capacity_factor": 0.6,
        "capacity_priority": "random",
    },
    "capacity for the surest": {
        "num_experts": 4,
        "top_k": 3,
        "capacity_factor": 0.5,
        "capacity_priority": "batch",
    },
    "capacity for the surest by noise": {
        "num_experts": 4,
        "top_k": 2,
        "routing": "noisy_top_k",
        "noise_std": 8.0,
        "capacity_factor": 0.5,
        "capacity_priority": "batch",
    },
    "capacity in pools": {
        "num_experts": 6,
        "top_k": 2,
        "capacity_factor": 0.7,
        "pools": "modality",
        "image_experts": 4,
        "capacity_priority": "batch",
    },
}


def options(extra: dict[str, dict[str, Any]] | None = None) -> Any:
    both = OPTIONS | (extra or {})
    return pytest.mark.parametrize("settings", list(both.values()), ids=list(both))


@options({"caption gate": {"num_experts": 4, "top_k": 2, "router_input": "caption"}})
@pytest.mark.parametrize(
    "balance",
    [{}, {"bias": "sign"}, {"bias": "zscore", "bias_per_modality": True}],
    ids=["", "bias", "two biases"],
)
def test_the_layer_equals_the_slow_one(settings: dict[str, Any], balance: dict[str, Any]) -> None:
    noisy = {"load_weight": 1.0} if settings.get("routing") == "noisy_top_k" else {}
    layer = make_layer(balance | noisy, **settings)
    tokens, listed = make_tokens(
        LENGTHS, PATCHES, ids=[5, 900, 7, 8], groups=[0, 0, 1, 1], draw=123
    )
    x = torch.randn(len(listed), WIDTH, dtype=torch.float64, requires_grad=True)
    y, stats = layer(x, tokens)
    true, chosen = slow_moe(layer, x, listed, draw=123)
    exact = (
        settings.get("routing") not in ("noisy_top_k",)
        and settings.get("router_input") != "caption"
    )
    close = (
        {"atol": 1e-11, "rtol": 1e-9} if exact else {"atol": 1e-5, "rtol": 1e-5}
    )  # float32 noise and gate
    torch.testing.assert_close(y, true, **close)
    expected = slow_statistics(layer, slow_logits(layer, x, listed), chosen, listed)
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(stats, name), value, msg=lambda text, name=name: f"{name}: {text}", **close
        )

    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    fields = [name for name in expected if name in GRADIENT_FIELDS]
    probes = {name: torch.randn_like(expected[name]) for name in fields}
    mine = (y * probe).sum() + sum((getattr(stats, name) * probes[name]).sum() for name in fields)
    slow = (true * probe).sum() + sum((expected[name] * probes[name]).sum() for name in fields)
    found = torch.autograd.grad(mine, inputs)
    for gradient, right in zip(found, torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(
            gradient, right, atol=10 * close["atol"], rtol=10 * close["rtol"]
        )


@options()
def test_evaluation_draws_and_drops_nothing_and_knows_no_batch_mates(
    settings: dict[str, Any],
) -> None:
    layer = make_layer(**settings).eval()
    tokens, listed = make_tokens(LENGTHS, PATCHES, groups=[0, 0, 0, 0], draw=1)
    x = torch.randn(len(listed), WIDTH, dtype=torch.float64)
    y, stats = layer(x, tokens._replace(identity_T=None, group_T=None))
    assert torch.equal(stats.kept_ME, stats.choices_ME)
    for pair in range(4):
        mine = [i for i, token in enumerate(listed) if token.pair == pair]
        alone, _ = make_tokens([LENGTHS[pair]], PATCHES, draw=2)
        torch.testing.assert_close(layer(x[mine], alone)[0], y[mine], atol=1e-11, rtol=1e-9)
    order = [2, 0, 3, 1]
    shuffled, relisted = make_tokens([LENGTHS[b] for b in order], PATCHES)
    places = [
        listed.index(
            next(
                t
                for t in listed
                if (t.pair, t.modality, t.position)
                == (order[token.pair], token.modality, token.position)
            )
        )
        for token in relisted
    ]
    torch.testing.assert_close(layer(x[places], shuffled)[0], y[places], atol=1e-11, rtol=1e-9)


@options()
def test_training_knows_no_batch_mates_outside_the_group(settings: dict[str, Any]) -> None:
    """Two micro-batches of one group each give what one micro-batch of both gives."""
    layer = make_layer(**settings)
    ids = [50, 60, 70, 80]
    tokens, listed = make_tokens(LENGTHS, PATCHES, ids=ids, groups=[0, 0, 1, 1], draw=9)
    x = torch.randn(len(listed), WIDTH, dtype=torch.float64)
    y, stats = layer(x, tokens)
    kept = torch.zeros_like(stats.kept_ME)
    for half in ([0, 1], [2, 3]):
        mine = [i for i, token in enumerate(listed) if token.pair in half]
        part, _ = make_tokens(
            [LENGTHS[b] for b in half], PATCHES, ids=[ids[b] for b in half], draw=9
        )
        y_part, part_stats = layer(x[mine], part)
        torch.testing.assert_close(y_part, y[mine], atol=1e-11, rtol=1e-9)
        kept += part_stats.kept_ME
    assert torch.equal(kept, stats.kept_ME)


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [12, 0, 0, 0], [0, 0, 0, 7]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_experts_equal_the_loop(
    counts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    from pretrain.moe.expert_loop import loop_swiglu

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
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, atol=tolerance, rtol=tolerance)


@options()
def test_both_backends_give_the_same_layer(settings: dict[str, Any]) -> None:
    """Also with dropped choices, whose rows the grouped product leaves as uninitialized memory."""
    results = []
    for backend in ("loop", "grouped"):
        layer = make_layer(**settings, backend=backend).float()
        tokens, listed = make_tokens(LENGTHS, PATCHES, groups=[0, 0, 1, 1], draw=4)
        torch.manual_seed(7)
        x = torch.randn(len(listed), WIDTH, requires_grad=True)
        y, _ = layer(x, tokens)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "dtype", "width", "looped"),
    [
        (0, torch.float32, 16, True),
        (127 * 4, torch.float32, 16, False),
        (128 * 4, torch.float32, 16, True),
        (8, torch.bfloat16, 16, False),
        (8, torch.float64, 16, True),
        (8, torch.float32, 12, True),
    ],
)
def test_the_cpu_loops_over_experts_with_many_rows(
    rows: int, dtype: torch.dtype, width: int, looped: bool
) -> None:
    experts = StackedExperts(width, 24, 4)
    assert experts.looped(torch.zeros(1, width, dtype=dtype), rows) == looped
    assert StackedExperts(width, 24, 4, "loop").looped(torch.zeros(1, width), 8)


@pytest.mark.parametrize("choice", ["top_k", "expert_choice"])
def test_weights_of_one_bring_tokens_back(choice: str) -> None:
    """Experts that answer 'the token itself' and weights that sum to one give each token back."""

    class Echo(torch.nn.Module):
        def looped(self, x: Tensor, rows: int) -> bool:
            return False

        def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
            assert int(counts.sum()) == len(rows)
            return rows

    torch.manual_seed(2)
    tokens, listed = make_tokens([5, 8], 6)
    config = MoEConfig(num_experts=8, top_k=3, routing=choice)  # type: ignore[arg-type]
    scored = score_tokens(torch.randn(len(listed), 8), config, tokens, block=0, noise=False)
    routing = choose(scored, config, tokens, None, block=0, noise=False)
    x = torch.randn(len(listed), 4)
    y = LocalDispatcher().run(x, routing, Echo(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(y[12:], x[12:])
    if choice == "top_k":
        torch.testing.assert_close(y, x)


def test_an_empty_batch_has_gradients_of_zero() -> None:
    for settings in (*OPTIONS.values(), {"num_experts": 4, "router_input": "caption"}):
        layer = make_layer(**settings)
        tokens, _ = make_tokens([], PATCHES)
        y, stats = layer(torch.zeros(0, WIDTH, dtype=torch.float64), tokens)
        (y.sum() + stats.prob_sum_ME.sum() + stats.z_sum_M.sum()).backward()
        assert y.shape == (0, WIDTH)
        assert stats.choices_ME.sum() == 0
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_statistics_of_first_choices_and_of_experts_chosen_together() -> None:
    layer = make_layer(num_experts=5, top_k=2)
    tokens, listed = make_tokens(LENGTHS, PATCHES)
    x = torch.randn(len(listed), WIDTH, dtype=torch.float64)
    _, stats = layer(x, tokens._replace(coactivation=True))
    _, chosen = slow_moe(layer, x, listed)
    first, coactivation, top = torch.zeros(2, 5), torch.zeros(5, 5), torch.zeros(2)
    for token, choices, scores in zip(listed, chosen.choices, chosen.scores, strict=True):
        first[token.modality, choices[0][0]] += 1
        top[token.modality] += float(scores.detach().max())
        for a, _ in choices:
            for b, _ in choices:
                coactivation[a, b] += 1
    assert torch.equal(stats.first_ME, first.long())
    assert torch.equal(stats.coactivation_EE, coactivation.long())
    torch.testing.assert_close(stats.top_sum_M.float(), top)
    assert layer(x, tokens)[1].coactivation_EE.numel() == 0


def test_counting() -> None:
    assert count_ids(torch.tensor([3, 3, 0]), 5).tolist() == [1, 0, 0, 2, 0]
