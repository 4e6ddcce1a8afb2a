"""Expert assignment: which experts process each token, and with which weights.

Pure functions of the router's logits. An assignment is a (token, expert, weight) triple. If every
token has the same number K of assignments, they are stored in the order token x K + k. With expert
choice, patches have varying numbers of assignments.

Shapes: T tokens, E experts, K experts per token, N assignments, M modalities, B pairs, P patches,
C patches per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.noise import gumbel, normal
from pretrain.moe.tokens import TokenBatch
from pretrain.moe.topk import topk_indices

ReplaceSelection = Callable[[str, Tensor, Tensor], Tensor]
"""Replaces the selected indices of each row, `[rows, n]`: experts of a token (`top_k`), or patches
of an expert in an image (`expert_choice`). Arguments: one of these names, the indices, and a hash
that identifies each row, int64 `[rows]`."""


class Routing(NamedTuple):
    """The assignments of a forward pass."""

    weights_N: Tensor
    """Gate weight of each assignment, float32, with gradient; 0 for dropped assignments."""
    expert_ids_N: Tensor
    """Global expert index of each assignment, int64; the number of experts for dropped
    assignments."""
    assignments_ME: Tensor
    """Number of assignments by modality and expert, int64, dropped ones included."""
    kept_ME: Tensor
    """Number of assignments within the capacity; `assignments_ME` itself without a capacity
    limit."""
    k: int
    """Assignments per token; 0 if it varies."""
    token_N: Tensor | None = None
    """Token index of each assignment, int64; None if assignment n belongs to token n // k."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Number of rows that each expert computes, int64."""
        return self.kept_ME.sum(dim=0)


class Scores(NamedTuple):
    """Inputs of expert selection; all float32 `[tokens, experts]`."""

    logits_TE: Tensor
    """Router logits times temperature; -inf for experts of the other modality's pool."""
    scores_TE: Tensor
    """Gate scores in [0, 1], without noise."""
    gates_TE: Tensor
    """Gate scores that select the experts and give the weights: those of the noisy logits if there
    is noise, otherwise `scores_TE` itself."""
    noisy_logits_TE: Tensor | None = None
    """Logits with the noise of this step (`noisy_top_k` during training)."""


def gate_scores(logits_TE: Tensor, score_func: Literal["softmax", "sigmoid"]) -> Tensor:
    """Gate scores from logits.

    `softmax` normalizes over experts; `sigmoid` scores each expert independently.
    """
    if score_func == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    return torch.sigmoid(logits_TE)


def score_tokens(
    logits_TE: Tensor, config: MoEConfig, tokens: TokenBatch, *, block_index: int, noise: bool
) -> Scores:
    """Compute the gate scores of every token for every expert.

    Args:
        logits_TE: Router logits, float32.
        config: Uses `temperature`, `pools`, `score_func`, `routing` and `logit_noise_std`.
        tokens: Metadata of the tokens.
        block_index: Index of the layer's block; part of the seed of its noise.
        noise: True during training: `noisy_top_k` adds noise to the logits.
    """
    logits_TE = mask_pools(logits_TE * config.temperature, config, tokens.num_patch_tokens)
    scores_TE = gate_scores(logits_TE, config.score_func)
    if not (noise and config.uses_noise):
        return Scores(logits_TE, scores_TE, scores_TE)

    assert tokens.token_hash_T is not None
    noise_TE = normal(
        tokens.token_hash_T,
        step_seed=tokens.step_seed,
        block_index=block_index,
        size=config.num_experts,
    )
    noisy_TE = logits_TE + noise_TE * config.logit_noise_std
    return Scores(logits_TE, scores_TE, gate_scores(noisy_TE, config.score_func), noisy_TE)


def mask_pools(logits_TE: Tensor, config: MoEConfig, num_patch_tokens: int) -> Tensor:
    """Set logits to -inf for experts of the other modality's pool: probability 0, no gradient."""
    if config.pools == "shared":
        return logits_TE
    patches, text = logits_TE.split([num_patch_tokens, logits_TE.shape[0] - num_patch_tokens])
    image_pool, text_pool = config.pool(0), config.pool(1)
    minus_inf = torch.full_like(logits_TE, float("-inf"))

    patch_rows = torch.cat([patches[:, image_pool], minus_inf[:num_patch_tokens, text_pool]], dim=1)
    text_rows = torch.cat([minus_inf[num_patch_tokens:, image_pool], text[:, text_pool]], dim=1)
    return torch.cat([patch_rows, text_rows])


def assign_experts(
    scored: Scores,
    config: MoEConfig,
    tokens: TokenBatch,
    bias_ME: Tensor | None,
    *,
    block_index: int,
    noise: bool,
    replace_selection: ReplaceSelection | None = None,
) -> Routing:
    """Assign experts to every token or, with `routing: expert_choice`, patches to every expert.

    Args:
        scored: Gate scores.
        config: Uses `routing`, `top_k`, `norm_topk_prob`, `score_func` and `pools`.
        tokens: Metadata of the tokens.
        bias_ME: Expert biases, `[M or 1, experts]`; they affect the selection, not the weights.
        block_index: Index of the layer's block; part of the seed of sampled routing.
        noise: True during training; evaluation always takes the best experts.
        replace_selection: Replaces the selected experts; needs `tokens.token_hash_T`.

    Sources: bias for selection only: Wang et al. 2024, arXiv:2408.15664; sampling without
    replacement as the k largest of log p + Gumbel noise: Kool et al. 2019, arXiv:1903.06059.
    """
    if config.routing == "expert_choice" and tokens.num_patch_tokens:
        return _expert_choice(scored, config, tokens, bias_ME, replace_selection)

    selection_scores_TE = scored.gates_TE.detach()
    if noise and config.routing == "sampled":
        assert tokens.token_hash_T is not None
        gumbel_TE = gumbel(
            tokens.token_hash_T,
            step_seed=tokens.step_seed,
            block_index=block_index,
            size=config.num_experts,
        )
        selection_scores_TE = _log_scores(scored.logits_TE.detach(), config.score_func) + gumbel_TE
    selection_scores_TE = mask_other_pool(
        _add_bias(selection_scores_TE, bias_ME, tokens.num_patch_tokens), scored, config
    )

    ids_TK = topk_indices(selection_scores_TE, config.top_k)
    if replace_selection is not None:
        assert tokens.token_hash_T is not None
        ids_TK = replace_selection("top_k", ids_TK, tokens.token_hash_T)
    weights_TK = _top_k_weights(scored.gates_TE, ids_TK, config)
    k = ids_TK.shape[1]
    assignments_ME = count_assignments(
        ids_TK.flatten(), tokens.num_patch_tokens * k, config.num_experts
    )
    return Routing(weights_TK.flatten(), ids_TK.flatten(), assignments_ME, assignments_ME, k)


def _log_scores(logits_TE: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        return torch.log_softmax(logits_TE, dim=-1)
    return torch.nn.functional.logsigmoid(logits_TE)


def _add_bias(selection_scores_TE: Tensor, bias_ME: Tensor | None, num_patch_tokens: int) -> Tensor:
    """Add the bias of each token's modality to its selection scores."""
    if bias_ME is None:
        return selection_scores_TE
    image_bias, text_bias = bias_ME[0], bias_ME[-1]
    return torch.cat(
        [
            selection_scores_TE[:num_patch_tokens] + image_bias,
            selection_scores_TE[num_patch_tokens:] + text_bias,
        ]
    )


def mask_other_pool(selection_scores_TE: Tensor, scored: Scores, config: MoEConfig) -> Tensor:
    """Set selection scores to -inf for experts of the other modality's pool.

    A score of 0 is not enough: the scores of a confident router may underflow to 0 inside the
    token's pool as well, and a bias may raise any of them.
    """
    if config.pools == "shared":
        return selection_scores_TE
    return selection_scores_TE.masked_fill(scored.logits_TE == float("-inf"), float("-inf"))


def _top_k_weights(gates_TE: Tensor, ids_TK: Tensor, config: MoEConfig) -> Tensor:
    """Weights of the selected experts, `[tokens, k]`.

    With `norm_topk_prob`, the weights of a token sum to 1. For k = 1 that would make every weight
    the constant 1 and leave the router without a gradient, so the raw score is kept (Fedus et al.
    2021, arXiv:2101.03961).
    """
    weights_TK = gates_TE.gather(1, ids_TK)
    if config.norm_topk_prob and config.top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return weights_TK


def _expert_choice(
    scored: Scores,
    config: MoEConfig,
    tokens: TokenBatch,
    bias_ME: Tensor | None,
    replace_selection: ReplaceSelection | None,
) -> Routing:
    """Assign to every expert its best patches of each image; text tokens use top-k routing.

    Each image is routed separately, so it does not depend on the rest of the batch. Expert choice
    would not be causal for text: whether an expert takes a token depends on later tokens. The
    weight of a patch is the raw score.

    Source: Zhou et al. 2022 (expert choice routing), arXiv:2202.09368.
    """
    pool = config.pool(0)
    split = tokens.num_patch_tokens
    device = scored.scores_TE.device

    scores_TE = scored.scores_TE[:split]
    scores_BPE = scores_TE.view(tokens.num_pairs, tokens.num_patches, -1)[:, :, pool]
    patches_per_expert = config.patches_per_expert(tokens.num_patches)
    scores_BEP = scores_BPE.transpose(1, 2)
    weights_BEC, patch_BEC = scores_BEP.topk(patches_per_expert, dim=-1)
    if replace_selection is not None:
        assert tokens.token_hash_T is not None
        hash_B = tokens.token_hash_T[:split].view(tokens.num_pairs, -1)[:, 0]
        hash_BE = hash_B.unsqueeze(1) + torch.arange(patch_BEC.shape[1], device=device)
        selected = replace_selection("expert_choice", patch_BEC.flatten(0, 1), hash_BE.flatten())
        patch_BEC = selected.view_as(patch_BEC)
        weights_BEC = scores_BEP.gather(2, patch_BEC)
    first_token_B11 = torch.arange(tokens.num_pairs, device=device).view(-1, 1, 1)
    first_token_B11 = first_token_B11 * tokens.num_patches
    expert_BEC = torch.arange(pool.start, pool.stop, device=device).view(1, -1, 1)
    expert_BEC = expert_BEC.expand_as(patch_BEC)

    text = Scores(scored.logits_TE[split:], scored.scores_TE[split:], scored.gates_TE[split:])
    text_bias = None if bias_ME is None else bias_ME[-1:]
    selection_scores_TE = mask_other_pool(
        _add_bias(text.gates_TE.detach(), text_bias, 0), text, config
    )
    ids_TK = topk_indices(selection_scores_TE, config.top_k)
    if replace_selection is not None:
        assert tokens.token_hash_T is not None
        ids_TK = replace_selection("top_k", ids_TK, tokens.token_hash_T[split:])
    weights_TK = _top_k_weights(text.gates_TE, ids_TK, config)
    text_token_N = torch.arange(split, split + len(ids_TK), device=device)
    text_token_N = text_token_N.repeat_interleave(ids_TK.shape[1])

    ids_N = torch.cat([expert_BEC.flatten(), ids_TK.flatten()])
    assignments_ME = count_assignments(ids_N, patch_BEC.numel(), config.num_experts)
    return Routing(
        weights_N=torch.cat([weights_BEC.flatten(), weights_TK.flatten()]),
        expert_ids_N=ids_N,
        assignments_ME=assignments_ME,
        kept_ME=assignments_ME,
        k=0,
        token_N=torch.cat([(first_token_B11 + patch_BEC).flatten(), text_token_N]),
    )


def count_assignments(ids_N: Tensor, num_patch_assignments: int, num_experts: int) -> Tensor:
    """Number of assignments by modality and expert, int64 `[modalities, experts]`.

    The first `num_patch_assignments` belong to patches. The index `num_experts` (dropped) is not
    counted.
    """
    return torch.stack(
        [
            count_ids(ids_N[:num_patch_assignments], num_experts + 1)[:num_experts],
            count_ids(ids_N[num_patch_assignments:], num_experts + 1)[:num_experts],
        ]
    )


def count_ids(ids_N: Tensor, size: int) -> Tensor:
    """Number of occurrences of each of `0..size-1`, int64 `[size]`."""
    if ids_N.is_cuda:
        # `bincount` would synchronize with the host to determine the largest index. Adding ones
        # does not, and integer sums do not depend on the order.
        counts = torch.zeros(size, dtype=torch.int64, device=ids_N.device)
        return counts.index_add_(0, ids_N, torch.ones_like(ids_N))
    return torch.bincount(ids_N, minlength=size)
