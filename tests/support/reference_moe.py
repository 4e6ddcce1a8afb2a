"""Reference implementation of the MoE layer: token by token and expert by expert, in plain Python.

Tests compare the layer with it. It has its own implementation of the layer's random numbers and
takes the tokens as a list of `Token`, in the order of the layer's flat tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.layer import MoELayer
from pretrain.moe.tokens import TokenBatch

# Shapes: T tokens, D width, M modalities, E experts.

MASK = (1 << 64) - 1
NOISE_PURPOSE, PRIORITY_PURPOSE = 1, 2


class Token(NamedTuple):
    """One token."""

    pair: int
    modality: int
    """0 is an image patch, 1 a text token."""
    position: int
    hash: int
    group: int
    """Capacity group."""


def splitmix64(x: int) -> int:
    """SplitMix64's finalizer on one integer."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def token_hash(pair_id: int, modality: int, position: int) -> int:
    """64-bit hash of a token."""
    return splitmix64(splitmix64(pair_id * 0x9E3779B97F4A7C15) + position + (modality << 32))


def random_bits(token: int, step_seed: int, block_index: int, purpose: int, column: int) -> int:
    """64 random bits for the token with this hash."""
    key = splitmix64(splitmix64(splitmix64(step_seed) + block_index) + purpose)
    return splitmix64(splitmix64(token ^ key) + (column + 1) * 0x9E3779B97F4A7C15)


def uniform(token: int, step_seed: int, block_index: int, column: int) -> float:
    """Uniform random number in (0, 1): an odd multiple of 2**-24."""
    return (
        (random_bits(token, step_seed, block_index, NOISE_PURPOSE, column) >> 41) + 0.5
    ) * 2.0**-23


def signed(x: int) -> int:
    """The signed integer with the same 64 bits."""
    return x - (1 << 64) if x >> 63 else x


def make_tokens(
    lengths: list[int],
    patches: int,
    *,
    ids: list[int] | None = None,
    groups: list[int] | None = None,
    step_seed: int = 0,
    columns: int = 8,
) -> tuple[TokenBatch, list[Token]]:
    """Tokens of pairs with captions of these lengths: the layer's metadata, and as a list."""
    ids, groups = ids or list(range(len(lengths))), groups or [0] * len(lengths)
    token_list = []
    for b in range(len(lengths)):
        for p in range(patches):
            token_list.append(Token(b, 0, p, token_hash(ids[b], 0, p), groups[b]))
    for b, length in enumerate(lengths):
        for s in range(length):
            token_list.append(Token(b, 1, s, token_hash(ids[b], 1, s), groups[b]))

    positions = [
        token.pair * columns + token.position for token in token_list if token.modality == 1
    ]
    tokens = TokenBatch(
        len(lengths),
        patches,
        columns,
        torch.tensor(positions, dtype=torch.int64),
        token_hash_T=torch.tensor([signed(token.hash) for token in token_list], dtype=torch.int64),
        group_T=torch.tensor([token.group for token in token_list], dtype=torch.int64),
        num_groups=max(groups, default=-1) + 1,
        step_seed=step_seed,
    )
    return tokens, token_list


def reference_logits(layer: MoELayer, x_TD: Tensor, token_list: list[Token]) -> list[Tensor]:
    """Router logits of each token; a caption gate adds causal attention over the caption."""
    logits = [layer.gate.weight @ x for x in x_TD]
    if layer.caption_gate is None:
        return logits

    query, value = layer.caption_gate.query, layer.caption_gate.value
    for i, token in enumerate(token_list):
        if token.modality == 0:
            continue
        context = [
            j
            for j, other in enumerate(token_list)
            if other.modality == 1 and other.pair == token.pair and other.position <= token.position
        ]
        caption_logits = []
        for e in range(len(query)):
            raw = torch.stack([x_TD[j] @ query[e] for j in context]) / math.sqrt(x_TD.shape[1])
            attention = torch.softmax(10 * torch.tanh(raw / 10), 0)
            weighted = [a * (x_TD[j] @ value[e]) for a, j in zip(attention, context, strict=True)]
            caption_logits.append(sum(weighted))
        logits[i] = logits[i] + torch.stack(caption_logits)
    return logits


class ReferenceRouting(NamedTuple):
    """Routing of each token."""

    scores: list[Tensor]
    """Scores `[E]` without noise."""
    gates: list[Tensor]
    """Scores `[E]` that weight the experts: with noise for `noisy_top_k` in training."""
    noisy: list[Tensor]
    """Logits `[E]` with noise."""
    assignments: list[list[tuple[int, Tensor]]]
    """(expert, weight), highest first."""
    kept: list[list[bool]]
    """Whether each assignment is within the expert's capacity."""


def reference_routing(
    layer: MoELayer, logits: list[Tensor], token_list: list[Token], step_seed: int
) -> ReferenceRouting:
    """Scores and assignments of all tokens."""
    config, experts = layer.config, range(layer.config.num_experts)
    is_noisy = layer.training and config.routing == "noisy_top_k"
    is_sampled = layer.training and config.routing == "sampled"

    scores, gates, noisy, assignments = [], [], [], []
    for raw, token in zip(logits, token_list, strict=True):
        row, pool = raw * config.temperature, list(experts[config.pool(token.modality)])
        scores.append(_score(config, row, pool))
        uniforms = [uniform(token.hash, step_seed, layer.block_index, e) for e in experts]
        noisy.append(row + _normal(uniforms, row) * config.noise_std / config.num_experts)
        gates.append(_score(config, noisy[-1], pool) if is_noisy else scores[-1])

        key = gates[-1].detach().clone()
        if is_sampled:
            negative_gumbel = [math.log(-math.log(u)) for u in uniforms]
            key = key.log() - torch.tensor(negative_gumbel, dtype=row.dtype)
        if layer.bias is not None:
            key = key + layer.bias.value[token.modality if len(layer.bias.value) > 1 else 0]
        assignments.append(_top_k(config, key, gates[-1], pool))

    if config.routing == "expert_choice":
        _expert_choice(layer, scores, token_list, assignments)
    kept = [[True] * len(assigned) for assigned in assignments]
    if config.capacity_factor and layer.training:
        kept = _within_capacity(layer, gates, token_list, assignments, step_seed)
    return ReferenceRouting(scores, gates, noisy, assignments, kept)


def _score(config: MoEConfig, row: Tensor, pool: list[int]) -> Tensor:
    """Scores `[E]`: softmax or sigmoid over the pool, 0 for other experts."""
    is_softmax = config.score_func == "softmax"
    values = torch.softmax(row[pool], 0) if is_softmax else torch.sigmoid(row[pool])
    return torch.zeros_like(row).index_copy(0, torch.tensor(pool), values)


def _normal(uniforms: list[float], like: Tensor) -> Tensor:
    """Normal random numbers by the inverse distribution function, computed in float64."""
    quantiles = [torch.erfinv(torch.tensor(2 * u - 1, dtype=torch.float64)) for u in uniforms]
    return torch.tensor([math.sqrt(2) * float(q) for q in quantiles], dtype=like.dtype)


def _top_k(
    config: MoEConfig, key: Tensor, gates: Tensor, pool: list[int]
) -> list[tuple[int, Tensor]]:
    """(expert, weight) of the k experts with the highest keys."""
    top = sorted(pool, key=lambda e: -float(key[e]))[: config.top_k]
    weights = [gates[e] for e in top]
    if config.norm_topk_prob and config.top_k > 1:
        weights = [weight / sum(weights) for weight in weights]
    return list(zip(top, weights, strict=True))


def _expert_choice(
    layer: MoELayer,
    scores: list[Tensor],
    token_list: list[Token],
    assignments: list[list[tuple[int, Tensor]]],
) -> None:
    """Replace the assignments of patches: each expert selects patches of each pair."""
    config = layer.config
    for pair in {token.pair for token in token_list}:
        patches = [
            i for i, token in enumerate(token_list) if (token.pair, token.modality) == (pair, 0)
        ]
        pool = range(config.num_experts)[config.pool(0)]
        capacity = min(len(patches), math.ceil(len(patches) * config.top_k / len(pool)))
        for i in patches:
            assignments[i] = []
        for expert in pool:
            best = sorted(patches, key=lambda i: -float(scores[i][expert].detach()))
            for i in best[:capacity]:
                assignments[i].append((expert, scores[i][expert]))


def _within_capacity(
    layer: MoELayer,
    gates: list[Tensor],
    token_list: list[Token],
    assignments: list[list[tuple[int, Tensor]]],
    step_seed: int,
) -> list[list[bool]]:
    """Whether each assignment gets a slot: first the best assignment of every token, in order of
    priority, then the second best, and so on.

    Priority `batch` orders tokens by their largest gate (V-MoE).
    """
    config = layer.config

    def priority(i: int) -> float:
        if config.capacity_priority == "position":
            return token_list[i].pair  # within a pair in the order of the list, patches first
        if config.capacity_priority == "batch":
            return -float(gates[i].detach().max())
        return signed(
            random_bits(token_list[i].hash, step_seed, layer.block_index, PRIORITY_PURPOSE, 0)
        )

    def capacity(token: Token) -> int:
        is_shared = config.pools == "shared"
        num_tokens = sum(
            other.group == token.group and (is_shared or other.modality == token.modality)
            for other in token_list
        )
        pool = len(range(config.num_experts)[config.pool(token.modality)])
        return math.ceil(config.capacity_factor * config.top_k * num_tokens / pool - 1e-9)

    order = sorted(range(len(token_list)), key=priority)
    used: dict[tuple[int, int], int] = {}
    kept = [[False] * len(assigned) for assigned in assignments]
    for k in range(config.top_k):
        for i in order:
            expert, group = assignments[i][k][0], token_list[i].group
            if used.get((group, expert), 0) < capacity(token_list[i]):
                used[group, expert] = used.get((group, expert), 0) + 1
                kept[i][k] = True
    return kept


def reference_moe(
    layer: MoELayer, x_TD: Tensor, token_list: list[Token], step_seed: int = 0
) -> tuple[Tensor, ReferenceRouting]:
    """The layer's output `[T, D]`, and the routing."""
    routing = reference_routing(
        layer, reference_logits(layer, x_TD, token_list), token_list, step_seed
    )
    experts, rows = layer.experts, []
    for x, assigned, kept in zip(x_TD, routing.assignments, routing.kept, strict=True):
        y = torch.zeros_like(x)
        for (expert, weight), is_kept in zip(assigned, kept, strict=True):
            if is_kept:
                w1, w2, w3 = experts.w1[expert], experts.w2[expert], experts.w3[expert]
                y = y + weight * (w2 @ (F.silu(w1 @ x) * (w3 @ x)))
        if layer.shared is not None:
            gate, up = (layer.shared.gate_up @ x).chunk(2)
            y = y + layer.shared.down @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows), routing
