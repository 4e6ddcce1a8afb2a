"""Places of experts: how many there are, and who gets them."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.experts import MoEConfig
from pretrain.moe.capacity import capacity, limit
from pretrain.moe.layer import MoELayer
from pretrain.moe.routing import choose, score_tokens
from tests.support.slow_moe import make_tokens, slow_choices, slow_logits

WIDTH = 16


@pytest.mark.parametrize("priority", ["position", "random", "batch"])
def test_capacity_is_respected_and_priority_is_right(priority: str) -> None:
    torch.manual_seed(3)
    config = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.5, capacity_priority=priority)  # type: ignore[arg-type]
    layer = MoELayer(WIDTH, config)
    torch.nn.init.normal_(layer.gate.weight)
    tokens, listed = make_tokens([4] * 6, 6, groups=[0, 0, 0, 1, 1, 1], draw=5)
    scored = score_tokens(
        layer.gate(torch.randn(len(listed), WIDTH)), config, tokens, block=0, noise=True
    )
    free = choose(scored, config, tokens, None, block=0, noise=True)
    routing = limit(free, scored.gates_TE, config, tokens, block=0)
    places = capacity(config, tokens)
    assert places.tolist() == [[8] * 4] * 2  # 0.5 x 2 x 30 / 4 = 7.5
    ids, kept = free.expert_ids_N.view(-1, 2), (routing.expert_ids_N < 4).view(-1, 2)
    assert torch.equal(routing.expert_ids_N[kept.flatten()], free.expert_ids_N[kept.flatten()])
    assert (routing.weights_N.view(-1, 2)[~kept] == 0).all() and (~kept).any()
    surety = scored.scores_TE.amax(1)
    for group in (0, 1):
        mine = torch.tensor([token.group == group for token in listed])
        for expert in range(4):
            wants = (ids == expert) & mine.unsqueeze(1)
            count = int((kept & wants).sum())
            assert count == min(8, int(wants.sum()))  # no place stays empty while somebody wants it
            for k in (0, 1):
                if not kept[:, k][
                    wants[:, k]
                ].all():  # a first choice lost: then no second one found a place
                    assert k == 1 or not kept[:, 1][wants[:, 1]].any()
                if priority == "batch" and kept[:, k][wants[:, k]].any():
                    lost = surety[wants[:, k] & ~kept[:, k]]
                    assert (lost <= surety[wants[:, k] & kept[:, k]].min()).all()
                if priority == "position":
                    wanting = wants[:, k].nonzero().flatten().tolist()
                    in_order = sorted(
                        wanting,
                        key=lambda i: (listed[i].pair, listed[i].modality, listed[i].position),
                    )
                    found = kept[in_order, k].int()
                    assert torch.equal(found, found.sort(descending=True).values)


@pytest.mark.parametrize(
    ("factor", "k", "experts", "count", "places"),
    [
        (1.1, 1, 1, 50, 55),  # 55.00000000000001 in float64
        (1.1, 2, 4, 100, 55),
        (1.2, 1, 1, 25, 30),  # 30.000002 in float32, exact in float64
        (1.05, 3, 4, 80, 63),  # 63.00000000000001 in float64
        (1.25, 2, 8, 8, 3),
        (0.5, 1, 4, 9, 2),  # 2.5 and 1.125: rounded up indeed
    ],
)
def test_places_are_those_of_exact_arithmetic(
    factor: float, k: int, experts: int, count: int, places: int
) -> None:
    config = MoEConfig(num_experts=experts, top_k=k, capacity_factor=factor)
    tokens, _ = make_tokens([count], 0, columns=count)
    assert capacity(config, tokens).tolist() == [[places] * experts]


def test_the_surest_tokens_are_those_of_the_gates_that_weigh() -> None:
    """With noise these are the noisy ones: no choice is left out for one of a token whose gate is
    smaller."""
    torch.manual_seed(4)
    config = MoEConfig(
        num_experts=4,
        top_k=2,
        routing="noisy_top_k",
        noise_std=8.0,
        capacity_factor=0.5,
        capacity_priority="batch",
        norm_topk_prob=False,
    )
    layer = MoELayer(WIDTH, config, block=2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, listed = make_tokens([4] * 6, 6, groups=[0, 0, 0, 1, 1, 1], draw=5)
    x_TD = torch.randn(len(listed), WIDTH)
    _, _, routing = layer.route(x_TD, tokens)
    slow = slow_choices(layer, slow_logits(layer, x_TD, listed), listed, 5)
    kept = (routing.expert_ids_N < 4).view(-1, 2).tolist()
    noisy, clean = (
        [float(row.detach().max()) for row in gates] for gates in (slow.gates, slow.scores)
    )

    def unfair(surety: list[float]) -> int:
        """Choices that were dropped although a less sure one of the same expert, group and rank was
        kept."""
        count = 0
        for rank in (0, 1):
            wanted = [
                (slow.choices[i][rank][0], listed[i].group, kept[i][rank], surety[i])
                for i in range(len(listed))
            ]
            for expert, group, found, mine in wanted:
                rivals = [
                    s
                    for e, g, other_found, s in wanted
                    if (e, g, other_found) == (expert, group, True)
                ]
                count += not found and any(mine > s for s in rivals)
        return count

    assert unfair(noisy) == 0
    assert (
        unfair(clean) > 5
    )  # noise of this size makes another order, so that the two are told apart
    # Of a first choice the token's largest gate is its own weight.
    weights = [[float(weight.detach()) for _, weight in mine] for mine in slow.choices]
    assert [mine[0] for mine in weights] == noisy
