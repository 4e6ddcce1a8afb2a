"""The routers' losses: values against plain formulas over tokens, gradients against autograd on the
whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, ByModality, MoEConfig
from pretrain.moe.auxiliary import balance_loss, linearize, short_of_experts, wanted_experts
from pretrain.moe.routing import choose, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats, stack_stats
from pretrain.moe.tokens import RouterTokens
from tests.support.slow_moe import make_tokens

EVERYTHING = BalanceConfig(
    balance_weight=0.3,
    router_z_weight=0.2,
    importance_weight=0.7,
    load_weight=0.9,
    local_entropy_weight=ByModality(image=0.11, text=0.5),
    global_entropy_weight=ByModality(image=1.3, text=0.6),
    global_entropy_experts=ByModality(image=5.5, text=3.0),
    expert_l1_weight=0.01,
    router_l1_weight=0.02,
)
LAYERS, EXPERTS, PATCHES = 2, 8, 3
LENGTHS, IDS = [4, 2, 5, 1, 3, 2], [3, 1, 4, 15, 9, 26]


def statistics(
    logits_LTE: Tensor,
    tokens: RouterTokens,
    config: MoEConfig,
    l1: tuple[Tensor, Tensor] | None = None,
) -> RouterStats:
    layers = []
    for block, logits in enumerate(logits_LTE):
        scored = score_tokens(logits, config, tokens, block=block, noise=True)
        routing = choose(scored, config, tokens, None, block=block, noise=True)
        layers.append(
            router_stats(
                logits,
                scored,
                routing,
                tokens,
                config,
                load=True,
                expert_l1=l1[0][block] if l1 else None,
                router_l1=l1[1][block] if l1 else None,
            )
        )
    return stack_stats(layers, EXPERTS, logits_LTE.device)


def slow_terms(
    logits_LTE: Tensor, tokens: RouterTokens, config: MoEConfig, stats: RouterStats
) -> dict[str, Tensor]:
    """Every term written over tokens, from its definition."""
    split, total = tokens.num_patch_tokens, logits_LTE.shape[1]
    members = [range(split), range(split, total)]
    pools = [list(range(EXPERTS)[config.pool(m)]) for m in (0, 1)]
    found: dict[str, list[Tensor]] = {}
    for layer in range(LAYERS):
        a = logits_LTE[layer] * config.temperature
        probs = []
        for t in range(total):
            mine = pools[0 if t < split else 1]
            score = (
                torch.softmax(a[t, mine], 0)
                if config.score_func == "softmax"
                else torch.sigmoid(a[t, mine])
            )
            probs.append(
                torch.zeros_like(a[t]).index_copy(0, torch.tensor(mine), score / score.sum())
            )

        def entropy(p: Tensor) -> Tensor:
            return -sum(v * v.log() for v in p if v > 0)

        def balance(
            tokens_in: list[int], mine: list[int], choices: Tensor, probs: list[Tensor] = probs
        ) -> Tensor:
            share = choices[mine] / choices[mine].sum()
            mean = sum(probs[t] for t in tokens_in)[mine] / len(tokens_in)
            return len(mine) * (share * mean).sum()

        def unevenness(sums: Tensor) -> Tensor:
            groups = [pools[0]] if config.pools == "shared" else pools
            return sum(
                ((sums[g] - sums[g].mean()) ** 2).mean() / sums[g].mean() ** 2 for g in groups
            ) / len(groups)

        choices = stats.choices_ME[layer].double()
        if config.pools == "shared":
            term = balance(list(range(total)), pools[0], choices.sum(0))
        else:
            term = sum(balance(list(members[m]), pools[m], choices[m]) for m in (0, 1)) / 2
        raw = [logits_LTE[layer, t, pools[0 if t < split else 1]] for t in range(total)]
        one = {
            "balance": term,
            "router_z": sum(torch.logsumexp(row, 0) ** 2 for row in raw) / total,
            "importance": unevenness(sum(probs)),
            "load": unevenness(stats.load_sum_ME[layer].sum(0)),
        }
        for m, name in enumerate(("image", "text")):
            inside = [probs[t] for t in members[m]]
            one[f"local_entropy_{name}"] = sum(entropy(p) for p in inside) / len(inside)
            short = math.log((5.5, 3.0)[m]) - entropy(sum(inside) / len(inside))
            one[f"global_entropy_{name}"] = short.clamp(min=0)
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return {name: sum(values) / LAYERS for name, values in found.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_func": "sigmoid", "temperature": 1.5},
        {"pools": "modality", "image_experts": 5, "top_k": 3},
        {"pools": "modality", "score_func": "sigmoid", "image_experts": 5, "temperature": 1.5},
    ],
    ids=["softmax", "sigmoid", "pools", "pools-sigmoid"],
)
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 0, 4, 1]], ids=str)
def test_shares_of_any_split_have_the_gradient_of_the_whole(
    settings: dict[str, Any], split: list[int]
) -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        **({"num_experts": EXPERTS, "top_k": 2, "routing": "noisy_top_k"} | settings)
    )
    tokens, listed = make_tokens(LENGTHS, PATCHES, ids=IDS, draw=8)
    logits = (2 * torch.randn(LAYERS, len(listed), EXPERTS, dtype=torch.float64)).requires_grad_()
    tokens_M = torch.tensor([PATCHES * 6.0, sum(LENGTHS)], dtype=torch.float64)
    # The whole batch in one piece, terms by their definitions.
    experts, routers = (
        torch.rand(LAYERS, 5, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    whole = statistics(logits, tokens, config)
    true = slow_terms(logits, tokens, config, whole)
    true |= {"expert_l1": experts.abs().sum(), "router_l1": routers.abs().sum()}
    weights = linearize(double(whole), tokens_M, config, EVERYTHING).weights
    assert set(true) == set(weights)
    expected = torch.autograd.grad(
        sum(weights[name] * value for name, value in true.items()), [logits, experts, routers]
    )

    # Each part by itself; the experts lie in two halves on neighboring parts, in two copies.
    parts, start = [], 0
    copies, count = 2, len(split)
    for number, pairs in enumerate(split):
        rows = range(start, start + pairs)
        mine, _ = make_tokens(
            [LENGTHS[b] for b in rows], PATCHES, ids=[IDS[b] for b in rows], draw=8
        )
        places = [i for i, token in enumerate(listed) if token.pair in rows]
        held = experts if count == 1 else experts.chunk(2, dim=1)[number % 2]
        l1 = (held.abs().sum(1), routers.abs().sum(1))
        parts.append(statistics(logits[:, places], mine, config, l1))
        start += pairs
    total = RouterStats(
        *(sum(p.detach().double() for p in fields) for fields in zip(*parts, strict=True))
    )
    copies = 1 if count == 1 else count / 2
    found = linearize(
        total,
        tokens_M,
        config,
        EVERYTHING,
        expert_copies=copies if count != 3 else 1.5,
        router_copies=count,
    )
    for name, value in true.items():
        if name != "expert_l1" or count % 2 == 0 or count == 1:
            torch.testing.assert_close(
                found.values[name],
                value.detach(),
                atol=1e-9,
                rtol=1e-7,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    shares = sum(found.share(part) for part in parts)
    for mine, right in zip(
        torch.autograd.grad(shares, [logits, experts, routers]), expected, strict=True
    ):
        torch.testing.assert_close(mine, right, atol=1e-9, rtol=1e-6)


def double(stats: RouterStats) -> RouterStats:
    return RouterStats(*(field.detach().double() for field in stats))


def test_balance_is_one_when_even_and_grows_when_all_choose_the_same() -> None:
    config, tokens = MoEConfig(num_experts=8), torch.tensor([60.0, 20.0])
    even = torch.full((1, 2, 8), 5.0)
    assert float(balance_loss(even, 4 * even, tokens, config)) == pytest.approx(1.0)
    certain = torch.zeros(1, 2, 8)
    certain[0, :, 3] = 40.0
    assert float(balance_loss(certain, certain, tokens, config)) == pytest.approx(8.0)
    halves = MoEConfig(num_experts=8, pools="modality", image_experts=6)
    pooled = torch.tensor([[[10.0] * 6 + [0.0] * 2, [0.0] * 6 + [10.0] * 2]])
    assert float(balance_loss(pooled, pooled, tokens, halves)) == pytest.approx(1.0)
    # Without text its pool says nothing.
    pooled[0, 1] = 0.0
    assert float(balance_loss(pooled, pooled, torch.tensor([60.0, 0.0]), halves)) == pytest.approx(
        1.0
    )


def test_global_entropy_asks_for_about_so_many_experts() -> None:
    four = torch.tensor([[0.25] * 4 + [0.0] * 4])
    assert float(short_of_experts(four, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(short_of_experts(four, 3.0)) == 0.0
    assert float(short_of_experts(four, 8.0)) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_experts": 32}, (16.0, 8.0)),
        ({"num_experts": 8, "pools": "modality"}, (4.0, 2.0)),
        ({"num_experts": 8, "pools": "modality", "image_experts": 3}, (3.0, 2.0)),
        ({"num_experts": 2}, (1.0, 1.0)),
    ],
)
def test_wanted_experts(settings: dict[str, Any], wanted: tuple[float, float]) -> None:
    moe = MoEConfig(**settings)
    assert tuple(wanted_experts(BalanceConfig(), moe, m) for m in (0, 1)) == wanted


def test_a_dense_trunk_and_an_empty_batch_have_terms_of_zero() -> None:
    none = stack_stats([], 8, torch.device("cpu"))
    found = linearize(double(none), torch.zeros(2, dtype=torch.float64), MoEConfig(), EVERYTHING)
    assert all(float(value) == 0 for value in found.values.values())
    assert float(found.share(none)) == 0
    config = MoEConfig(num_experts=EXPERTS, routing="noisy_top_k")
    tokens, _ = make_tokens([], PATCHES)
    empty = statistics(torch.zeros(LAYERS, 0, EXPERTS), tokens, config)
    found = linearize(double(empty), torch.zeros(2, dtype=torch.float64), config, EVERYTHING)
    assert all(math.isfinite(float(value)) for value in found.values.values())
    assert all(bool(torch.isfinite(c).all()) for c in found.coefficients.values())


def test_a_modality_without_tokens_is_not_short_of_experts() -> None:
    """Its mean distribution would be all zeros, whose entropy is 0: log S short, whatever the
    router does."""
    config = MoEConfig(num_experts=EXPERTS)
    alone = BalanceConfig(
        balance_weight=0.0,
        router_z_weight=0.0,
        global_entropy_weight=ByModality(image=1.3, text=0.6),
    )
    for missing, (lengths, patches) in enumerate((([5, 4], 0), ([0, 0, 0], 3))):
        tokens, listed = make_tokens(lengths, patches)
        logits = 3 * torch.randn(LAYERS, len(listed), EXPERTS)
        tokens_M = torch.tensor([9.0, 9.0])
        tokens_M[missing] = 0.0
        found = linearize(double(statistics(logits, tokens, config)), tokens_M, config, alone)
        values = [float(found.values[f"global_entropy_{name}"]) for name in ("image", "text")]
        assert values[missing] == 0.0
        assert not found.coefficients["prob_sum_ME"][:, missing].any()


def test_terms_without_weight_are_left_out_but_balance_and_z() -> None:
    config = MoEConfig(num_experts=EXPERTS)
    tokens, listed = make_tokens(LENGTHS, PATCHES)
    stats = statistics(torch.randn(LAYERS, len(listed), EXPERTS), tokens, config)
    off = linearize(
        double(stats),
        torch.tensor([18.0, 17.0]),
        config,
        BalanceConfig(balance_weight=0.0, router_z_weight=0.0),
    )
    assert set(off.values) == {"balance", "router_z"} and set(off.weights.values()) == {0.0}
    assert not any(bool(c.any()) for c in off.coefficients.values())
