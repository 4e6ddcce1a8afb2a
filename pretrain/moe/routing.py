"""Which experts each token visits, and with what weight. Pure functions of the router's logits.

A choice is a (token, expert, weight). Where every token has the same number K of choices they stand
in the order token x K + k; patches that are chosen *by* experts have any number of choices each.

Shapes: T tokens, E experts, K experts per token, N choices, M modalities, B pairs, P patches.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.noise import gumbel, normal
from pretrain.moe.tokens import RouterTokens


class Routing(NamedTuple):
    """The choices of a forward pass."""

    weights_N: Tensor
    """Gate weight of each choice, float32; gradient flows through these. 0 for one that found no
    place."""
    expert_ids_N: Tensor
    """Expert of each choice by global number, int64; the number of experts for one that found no
    place."""
    choices_ME: Tensor
    """Choices by modality and expert, int64, also those that found no place."""
    kept_ME: Tensor
    """Choices that found a place; `choices_ME` itself without capacity."""
    k: int
    """Choices of every token; 0 where tokens have different numbers of them."""
    token_N: Tensor | None = None
    """Token of each choice, int64; None where it is n // k."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Rows that each expert has to compute, int64."""
        return self.kept_ME.sum(dim=0)


class Scores(NamedTuple):
    """What a choice is made from; all float32 `[tokens, experts]`."""

    logits_TE: Tensor
    """Router logits times temperature; -inf for experts of the other modality's pool."""
    scores_TE: Tensor
    """Gate scores in [0, 1] without noise."""
    gates_TE: Tensor
    """Gate scores that choose and weigh: those of the noisy logits where there is noise, else
    `scores_TE` itself."""
    noisy_logits_TE: Tensor | None = None
    """Logits with this step's noise (`noisy` while training)."""


def gate_scores(logits_TE: Tensor, score: Literal["softmax", "sigmoid"]) -> Tensor:
    """Turn logits into gate scores: `softmax` competes between experts, `sigmoid` judges each
    alone."""
    return torch.softmax(logits_TE, dim=-1) if score == "softmax" else torch.sigmoid(logits_TE)


def score_tokens(
    logits_TE: Tensor, config: MoEConfig, tokens: RouterTokens, *, block: int, noise: bool
) -> Scores:
    """Scores of every expert for every token.

    Args:
        logits_TE: Router logits, float32.
        config: `temperature`, `pools`, `score`, `choice`.
        tokens: Where the tokens come from.
        block: The layer's block, a part of what its noise is drawn from.
        noise: Training: noisy choices get their noise.
    """
    logits_TE = keep_to_pools(logits_TE * config.temperature, config, tokens.num_patch_tokens)
    scores_TE = gate_scores(logits_TE, config.score_func)
    if not (noise and config.routing == "noisy_top_k"):
        return Scores(logits_TE, scores_TE, scores_TE)
    assert tokens.identity_T is not None
    noise_TE = normal(tokens.identity_T, draw=tokens.draw, block=block, size=config.num_experts)
    noisy_TE = logits_TE + noise_TE * config.noise_deviation
    return Scores(logits_TE, scores_TE, gate_scores(noisy_TE, config.score_func), noisy_TE)


def keep_to_pools(logits_TE: Tensor, config: MoEConfig, num_patch_tokens: int) -> Tensor:
    """-inf where an expert belongs to the other modality's pool; a probability of 0, without
    gradient."""
    if config.pools == "shared":
        return logits_TE
    patches, text = logits_TE.split([num_patch_tokens, logits_TE.shape[0] - num_patch_tokens])
    image, rest = config.pool(0), config.pool(1)
    minus_inf = torch.full_like(logits_TE, float("-inf"))
    patch_rows = torch.cat([patches[:, image], minus_inf[:num_patch_tokens, rest]], dim=1)
    text_rows = torch.cat([minus_inf[num_patch_tokens:, image], text[:, rest]], dim=1)
    return torch.cat([patch_rows, text_rows])


def choose(
    scored: Scores,
    config: MoEConfig,
    tokens: RouterTokens,
    bias_ME: Tensor | None,
    *,
    block: int,
    noise: bool,
) -> Routing:
    """Choose experts for every token, or, with `choice: expert`, patches for every expert.

    The bias of the loss-free balancing steers the choice and not the weight (Wang et al. 2024,
    arXiv:2408.15664). Evaluation (`noise=False`) takes the best, whatever training draws.
    """
    if config.routing == "expert_choice" and tokens.num_patch_tokens:
        return _experts_choose_patches(scored, config, tokens, bias_ME)
    key_TE = scored.gates_TE.detach()
    if noise and config.routing == "sampled":
        assert tokens.identity_T is not None
        # The k largest of log p + Gumbel are k draws without replacement from p (Vieira 2014; Kool
        # et al. 2019, arXiv:1903.06059).
        drawn_TE = gumbel(tokens.identity_T, draw=tokens.draw, block=block, size=config.num_experts)
        key_TE = _log_scores(scored.logits_TE.detach(), config.score_func) + drawn_TE
    key_TE = own_pool(_biased(key_TE, bias_ME, tokens.num_patch_tokens), scored, config)
    weights_TK, ids_TK = _best(scored.gates_TE, key_TE, config)
    choices_ME = count_choices(
        ids_TK.flatten(), tokens.num_patch_tokens * ids_TK.shape[1], config.num_experts
    )
    return Routing(weights_TK.flatten(), ids_TK.flatten(), choices_ME, choices_ME, ids_TK.shape[1])


def _log_scores(logits_TE: Tensor, score: str) -> Tensor:
    logs = torch.log_softmax if score == "softmax" else None
    return logs(logits_TE, dim=-1) if logs else torch.nn.functional.logsigmoid(logits_TE)


def _biased(key_TE: Tensor, bias_ME: Tensor | None, num_patch_tokens: int) -> Tensor:
    """The key of the choice with the bias of each token's modality."""
    if bias_ME is None:
        return key_TE
    first, last = bias_ME[0], bias_ME[-1]
    return torch.cat([key_TE[:num_patch_tokens] + first, key_TE[num_patch_tokens:] + last])


def own_pool(key_TE: Tensor, scored: Scores, config: MoEConfig) -> Tensor:
    """The key with -inf for experts of the other modality's pool.

    Their score of 0 is not enough: a sure router's scores underflow to 0 in the token's own pool as
    well, and a bias may lift any of them.
    """
    if config.pools == "shared":
        return key_TE
    return key_TE.masked_fill(scored.logits_TE == float("-inf"), float("-inf"))


def _best(weight_TE: Tensor, key_TE: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the k experts with the largest keys.

    Renormalized, the weights of a token sum to one. With k = 1 that would make every weight the
    constant 1 and leave the router without a gradient, so a single choice keeps its raw score
    (Fedus et al. 2021, arXiv:2101.03961).
    """
    ids_TK = _largest(key_TE, config.top_k)
    weights_TK = weight_TE.gather(1, ids_TK)
    if config.norm_topk_prob and config.top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return weights_TK, ids_TK


def _largest(key_TE: Tensor, k: int) -> Tensor:
    """The columns of the k largest keys of each row, the largest first, int64 `[tokens, k]`."""
    if key_TE.is_cuda or k > FEW:
        return key_TE.topk(k, dim=-1).indices
    # The CPU's topk sorts; taking the largest one away k times is several times faster while k is
    # small.
    left_TE = key_TE.clone()
    taken = []
    for _ in range(k):
        best_T1 = left_TE.argmax(dim=-1, keepdim=True)
        left_TE.scatter_(1, best_T1, float("-inf"))
        taken.append(best_T1)
    return torch.cat(taken, dim=1)


FEW = 4
"""Up to so many choices of a token the CPU takes the largest one by one. 4096 tokens, 64 experts,
milliseconds on one core against `top_k`: k = 2: 0.7 and 2.2, k = 4: 1.4 and 2.3, k = 8: 2.8 and
2.6."""


def _experts_choose_patches(
    scored: Scores, config: MoEConfig, tokens: RouterTokens, bias_ME: Tensor | None
) -> Routing:
    """Every expert takes its best patches of each image; text chooses as ever.

    Each image is a group of its own, so a picture does not depend on its batch. Text cannot be
    chosen so: which tokens an expert takes would tell earlier ones of later ones. The weight is the
    raw score (Zhou et al. 2022, arXiv:2202.09368).
    """
    pool = config.pool(0)
    split = tokens.num_patch_tokens
    scores_BPE = scored.scores_TE[:split].view(tokens.num_pairs, tokens.num_patches, -1)[:, :, pool]
    taken = config.patches_per_expert(tokens.num_patches)
    weights_BEC, places_BEC = scores_BPE.transpose(1, 2).topk(taken, dim=-1)
    device = places_BEC.device
    pairs = torch.arange(tokens.num_pairs, device=device).view(-1, 1, 1) * tokens.num_patches
    experts = (
        torch.arange(pool.start, pool.stop, device=device).view(1, -1, 1).expand_as(places_BEC)
    )
    text = Scores(scored.logits_TE[split:], scored.scores_TE[split:], scored.gates_TE[split:])
    text_bias = None if bias_ME is None else bias_ME[-1:]
    key_TE = own_pool(_biased(text.gates_TE.detach(), text_bias, 0), text, config)
    weights_TK, ids_TK = _best(text.gates_TE, key_TE, config)
    text_tokens = torch.arange(split, split + len(ids_TK), device=device).repeat_interleave(
        ids_TK.shape[1]
    )
    ids_N = torch.cat([experts.flatten(), ids_TK.flatten()])
    choices_ME = count_choices(ids_N, places_BEC.numel(), config.num_experts)
    return Routing(
        torch.cat([weights_BEC.flatten(), weights_TK.flatten()]),
        ids_N,
        choices_ME,
        choices_ME,
        0,
        torch.cat([(pairs + places_BEC).flatten(), text_tokens]),
    )


def count_choices(ids_N: Tensor, num_patch_choices: int, num_experts: int) -> Tensor:
    """Choices by modality and expert, int64; numbers from `num_experts` on are left out."""
    return torch.stack(
        [
            count_ids(ids_N[:num_patch_choices], num_experts + 1)[:num_experts],
            count_ids(ids_N[num_patch_choices:], num_experts + 1)[:num_experts],
        ]
    )


def count_ids(ids_N: Tensor, size: int) -> Tensor:
    """How often each of `0..size-1` occurs, int64 `[size]`.

    On a GPU `bincount` would stop the host to learn the largest id; adding ones does not, and
    integers add up to the same sum in any order.
    """
    if ids_N.is_cuda:
        return torch.zeros(size, dtype=torch.int64, device=ids_N.device).index_add_(
            0, ids_N, torch.ones_like(ids_N)
        )
    return torch.bincount(ids_N, minlength=size)
