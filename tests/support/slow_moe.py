"""The sparse layer written slowly: token by token, expert by expert, in plain Python. An oracle for
tests.

It takes its random numbers from a generator of its own making, `draw_numbers`, and its tokens as a
list of (pair, modality, position), in the order of the layer's flat list.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.layer import MoELayer
from pretrain.moe.tokens import RouterTokens

MASK = (1 << 64) - 1


class Token(NamedTuple):
    """Where a token comes from."""

    pair: int
    modality: int
    position: int
    identity: int
    group: int


def scramble(x: int) -> int:
    """SplitMix64's finalizer on one whole number."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def identity(pair_id: int, modality: int, position: int) -> int:
    """The hash of a token."""
    return scramble(scramble(pair_id * 0x9E3779B97F4A7C15) + position + (modality << 32))


def number(token: int, draw: int, block: int, purpose: int, column: int) -> int:
    """The 64 bits that a token draws."""
    key = scramble(scramble(scramble(draw) + block) + purpose)
    return scramble(scramble(token ^ key) + (column + 1) * 0x9E3779B97F4A7C15)


def uniform(token: int, draw: int, block: int, column: int) -> float:
    """An odd multiple of 2**-24."""
    return ((number(token, draw, block, 1, column) >> 41) + 0.5) * 2.0**-23


def make_tokens(
    lengths: list[int],
    patches: int,
    *,
    ids: list[int] | None = None,
    groups: list[int] | None = None,
    draw: int = 0,
    columns: int = 8,
) -> tuple[RouterTokens, list[Token]]:
    """Tokens of pairs with captions of these lengths: as the layer wants them, and as a list."""
    ids, groups = ids or list(range(len(lengths))), groups or [0] * len(lengths)
    listed = [
        Token(b, 0, p, identity(ids[b], 0, p), groups[b])
        for b in range(len(lengths))
        for p in range(patches)
    ]
    listed += [
        Token(b, 1, s, identity(ids[b], 1, s), groups[b])
        for b, n in enumerate(lengths)
        for s in range(n)
    ]
    positions = torch.tensor(
        [b * columns + s for b, n in enumerate(lengths) for s in range(n)], dtype=torch.int64
    )

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    tokens = RouterTokens(
        len(lengths),
        patches,
        columns,
        positions,
        identity_T=torch.tensor([signed(token.identity) for token in listed], dtype=torch.int64),
        group_T=torch.tensor([token.group for token in listed], dtype=torch.int64),
        num_groups=max(groups, default=-1) + 1,
        draw=draw,
    )
    return tokens, listed


def slow_logits(layer: MoELayer, x_TD: Tensor, listed: list[Token]) -> list[Tensor]:
    """Router logits of each token; with a caption gate, text tokens read their caption so far."""
    logits = [layer.gate.weight @ x for x in x_TD]
    if layer.caption_gate is None:
        return logits
    query, value = layer.caption_gate.query, layer.caption_gate.value
    for i, token in enumerate(listed):
        if token.modality == 0:
            continue
        earlier = [
            j
            for j, other in enumerate(listed)
            if other.modality == 1 and other.pair == token.pair and other.position <= token.position
        ]
        said = []
        for e in range(len(query)):
            raw = torch.stack([x_TD[j] @ query[e] for j in earlier]) / math.sqrt(x_TD.shape[1])
            attention = torch.softmax(10 * torch.tanh(raw / 10), 0)
            said.append(
                sum(a * (x_TD[j] @ value[e]) for a, j in zip(attention, earlier, strict=True))
            )
        logits[i] = logits[i] + torch.stack(said)
    return logits


class Chosen(NamedTuple):
    """What the slow layer did."""

    scores: list[Tensor]
    """Of every token, without noise."""
    gates: list[Tensor]
    """Of every token, those that weigh: with the noise of noisy choices."""
    noisy: list[Tensor]
    """Logits with noise."""
    choices: list[list[tuple[int, Tensor]]]
    """(expert, weight) of every token, first choice first."""
    kept: list[list[bool]]


def slow_choices(layer: MoELayer, logits: list[Tensor], listed: list[Token], draw: int) -> Chosen:
    """Who visits whom."""
    config, k = layer.config, layer.config.top_k
    experts = range(config.num_experts)
    training = layer.training
    allowed = [
        [e for e in experts if e in range(config.num_experts)[config.pool(t.modality)]]
        for t in listed
    ]

    def score(row: Tensor, mine: list[int]) -> Tensor:
        values = (
            torch.softmax(row[mine], 0)
            if config.score_func == "softmax"
            else torch.sigmoid(row[mine])
        )
        return torch.zeros_like(row).index_copy(0, torch.tensor(mine), values)

    scores, gates, noisy_logits, choices = [], [], [], []
    for row, token, mine in zip(logits, listed, allowed, strict=True):
        row = row * config.temperature
        scores.append(score(row, mine))
        u = [uniform(token.identity, draw, layer.block, e) for e in experts]
        noise = torch.tensor(
            [
                math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * v - 1, dtype=torch.float64)))
                for v in u
            ],
            dtype=row.dtype,
        )
        noisy_logits.append(row + noise * config.noise_std / config.num_experts)
        weight = (
            score(noisy_logits[-1], mine)
            if training and config.routing == "noisy_top_k"
            else scores[-1]
        )
        gates.append(weight)
        key = weight.detach().clone()
        if training and config.routing == "sampled":
            key = key.log() - torch.tensor([math.log(-math.log(v)) for v in u], dtype=row.dtype)
        if layer.bias is not None:
            key = key + layer.bias.value[token.modality if len(layer.bias.value) > 1 else 0]
        best = sorted(mine, key=lambda e: -float(key[e]))[:k]
        weights = [weight[e] for e in best]
        if config.norm_topk_prob and k > 1:
            weights = [w / sum(weights) for w in weights]
        choices.append(list(zip(best, weights, strict=True)))
    if config.routing == "expert_choice":
        _experts_choose(layer, scores, listed, choices)
    kept = [[True] * len(mine) for mine in choices]
    if config.capacity_factor and training:
        kept = _limited(layer, gates, listed, choices, draw)
    return Chosen(scores, gates, noisy_logits, choices, kept)


def _experts_choose(
    layer: MoELayer,
    scores: list[Tensor],
    listed: list[Token],
    choices: list[list[tuple[int, Tensor]]],
) -> None:
    """Replace the choices of patches."""
    config = layer.config
    for pair in {token.pair for token in listed}:
        mine = [i for i, token in enumerate(listed) if token.pair == pair and token.modality == 0]
        pool = range(config.num_experts)[config.pool(0)]
        taken = min(len(mine), math.ceil(len(mine) * config.top_k / len(pool)))
        for i in mine:
            choices[i] = []
        for expert in pool:
            for i in sorted(mine, key=lambda i: -float(scores[i][expert].detach()))[:taken]:
                choices[i].append((expert, scores[i][expert]))


def _limited(
    layer: MoELayer,
    gates: list[Tensor],
    listed: list[Token],
    choices: list[list[tuple[int, Tensor]]],
    draw: int,
) -> list[list[bool]]:
    """Fill the places one choice after the other; the surest token is the one with the largest gate
    (V-MoE)."""
    config = layer.config

    def priority(i: int) -> float:
        if config.capacity_priority == "position":
            return listed[i].pair  # and in a pair as they are listed, the patches first
        if config.capacity_priority == "batch":
            return -float(gates[i].detach().max())
        bits = number(listed[i].identity, draw, layer.block, 2, 0)
        return bits - (1 << 64) if bits >> 63 else bits

    order = sorted(range(len(listed)), key=priority)
    taken: dict[tuple[int, int], int] = {}
    kept = [[False] * len(mine) for mine in choices]
    for rank in range(config.top_k):
        for i in order:
            expert, group = choices[i][rank][0], listed[i].group
            modality = listed[i].modality
            rivals = [
                t
                for t in listed
                if t.group == group and (config.pools == "shared" or t.modality == modality)
            ]
            pool = len(range(config.num_experts)[config.pool(modality)])
            places = math.ceil(config.capacity_factor * config.top_k * len(rivals) / pool - 1e-9)
            if taken.get((group, expert), 0) < places:
                taken[group, expert] = taken.get((group, expert), 0) + 1
                kept[i][rank] = True
    return kept


def slow_moe(
    layer: MoELayer, x_TD: Tensor, listed: list[Token], draw: int = 0
) -> tuple[Tensor, Chosen]:
    """The layer's output `[tokens, width]`, and what was chosen."""
    chosen = slow_choices(layer, slow_logits(layer, x_TD, listed), listed, draw)
    rows = []
    for x, choices, kept in zip(x_TD, chosen.choices, chosen.kept, strict=True):
        y = torch.zeros_like(x)
        for (expert, weight), found_place in zip(choices, kept, strict=True):
            if found_place:
                w1, w2, w3 = (
                    w[expert] for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3)
                )
                y = y + weight * (w2 @ (F.silu(w1 @ x) * (w3 @ x)))
        if layer.shared is not None:
            gate, up = (layer.shared.gate_up @ x).chunk(2)
            y = y + layer.shared.down @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows), chosen


def slow_statistics(
    layer: MoELayer, logits: list[Tensor], chosen: Chosen, listed: list[Token]
) -> dict[str, Tensor]:
    """The sums that the auxiliary terms are made of."""
    config, experts = layer.config, layer.config.num_experts
    like = logits[0]
    found = {
        "prob_sum_ME": torch.zeros(2, experts).to(like),
        "z_sum_M": torch.zeros(2).to(like),
        "entropy_sum_M": torch.zeros(2).to(like),
        "load_sum_ME": torch.zeros(2, experts).to(like),
        "choices_ME": torch.zeros(2, experts, dtype=torch.int64),
        "kept_ME": torch.zeros(2, experts, dtype=torch.int64),
    }
    found = {name: list(value) for name, value in found.items()}
    for i, token in enumerate(listed):
        m, score = token.modality, chosen.scores[i]
        mine = range(experts)[config.pool(m)]
        probs = score / score.sum()
        found["prob_sum_ME"][m] = found["prob_sum_ME"][m] + probs
        found["z_sum_M"][m] = found["z_sum_M"][m] + torch.logsumexp(logits[i][list(mine)], 0) ** 2
        found["entropy_sum_M"][m] = found["entropy_sum_M"][m] - sum(
            probs[e] * probs[e].log() for e in mine
        )
        if layer.balance.load_weight:
            best = sorted((chosen.noisy[i][e] for e in mine), key=lambda v: -float(v.detach()))
            threshold = best[config.top_k - 1]
            needed = (threshold - logits[i] * config.temperature) / (config.noise_std / experts)
            load = 0.5 * torch.erfc(needed / math.sqrt(2))
            found["load_sum_ME"][m] = found["load_sum_ME"][m] + torch.stack(
                [load[e] if e in mine else load[e] * 0 for e in range(experts)]
            )
        for (expert, _), kept in zip(chosen.choices[i], chosen.kept[i], strict=True):
            found["choices_ME"][m][expert] += 1
            found["kept_ME"][m][expert] += kept
    return {name: torch.stack(value) for name, value in found.items()}
