"""Counts the assignments of the routers, batch by batch, in evaluation mode.

`record_routing` records the assignments of every router; `RoutingCounts.add` counts them. Memory
does not grow with the number of samples.

Shapes: L MoE layers, M modalities (0 image, 1 text), E experts, T tokens, N assignments, B pairs,
W words, X patches kept for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.layer import MoELayer
from pretrain.moe.tokens import MODALITIES, TokenBatch

Array = np.ndarray[Any, Any]


class RoutingRecord(NamedTuple):
    """The assignments of one router for one batch, on CPU."""

    token_N: Tensor
    """Token index of each assignment, int64; the patches of all pairs precede all text tokens."""
    expert_N: Tensor
    """Expert of each assignment, int64."""
    weight_N: Tensor
    """Gate weight of each assignment, float32."""
    entropy_T: Tensor
    """Entropy (nats) of each token's scores, normalized over the experts."""
    num_pairs: int
    num_patches: int
    """Patches of each pair."""

    @property
    def num_patch_tokens(self) -> int:
        """Index of the first text token."""
        return self.num_pairs * self.num_patches


@contextmanager
def record_routing(model: VisionLanguageModel) -> Iterator[list[RoutingRecord]]:
    """Yields a list that contains, after each forward pass, the records of all MoE layers.

    The model must be in evaluation mode: the router is evaluated a second time for the record.
    """
    records: list[RoutingRecord] = []
    layers = model.moe_layers()

    def record(layer: nn.Module, inputs: tuple[Tensor, TokenBatch], _: Any) -> None:
        assert isinstance(layer, MoELayer)
        assert not layer.training, "routing is only deterministic in evaluation mode"
        if layer is layers[0]:
            records.clear()
        records.append(_route(layer, *inputs))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _route(layer: MoELayer, x_TD: Tensor, tokens: TokenBatch) -> RoutingRecord:
    """Evaluate the layer's router again."""
    _, scored, routing = layer.route(x_TD, tokens)
    probs_TE = scored.scores_TE / scored.scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    token_N = routing.token_N
    if token_N is None:
        token_N = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(routing.k)
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    return RoutingRecord(
        token_N.cpu(),
        routing.expert_ids_N.cpu(),
        routing.weights_N.detach().cpu(),
        entropy_T.detach().cpu(),
        tokens.num_pairs,
        tokens.num_patches,
    )


class RoutingCounts:
    """Sums over all batches."""

    def __init__(self, num_layers: int, num_experts: int, *, patches: int = 4) -> None:
        """Start with zeros.

        Args:
            num_layers: MoE layers.
            num_experts: Routed experts of each layer.
            patches: Patches to keep for each expert.
        """
        self.pairs = 0
        self.tokens_M: Array = np.zeros(len(MODALITIES), dtype=np.int64)
        shape = (num_layers, len(MODALITIES), num_experts)
        self.load_LME: Array = np.zeros(shape, dtype=np.int64)
        """Tokens assigned to each expert."""
        self.weight_LME: Array = np.zeros(shape)
        """Sum of their gate weights."""
        self.entropy_LME: Array = np.zeros(shape)
        """Sum of the entropies of their scores."""
        self.entropy_LM: Array = np.zeros(shape[:2])
        """Sum of the entropies over all tokens, each counted once."""
        self.coactivation_LMEE: Array = np.zeros((*shape, num_experts), dtype=np.int64)
        """Tokens assigned to both experts; the diagonal is the load."""
        self.words_W: Array = np.zeros(0, dtype=np.int64)
        """Text tokens of each word."""
        self.words_LEW: Array = np.zeros((num_layers, num_experts, 0), dtype=np.int32)
        """Text tokens of each word assigned to each expert."""
        kept = (num_layers, num_experts, patches)
        self.patch_weight_LEX: Array = np.zeros(kept, dtype=np.float32)
        """Gate weights of the kept patches, descending; 0 for empty slots."""
        self.patch_sample_LEX: Array = np.full(kept, -1, dtype=np.int64)
        """Sample indices of the kept patches; -1 for empty slots."""
        self.patch_index_LEX: Array = np.zeros(kept, dtype=np.int64)
        """Indices of the kept patches in their images."""

    def add(self, records: Sequence[RoutingRecord], word_T: Array, sample_B: Array) -> None:
        """Count one batch.

        Args:
            records: The record of each MoE layer.
            word_T: Word index of each text token, int64.
            sample_B: Sample index of each pair, int64.
        """
        self.pairs += len(sample_B)
        self.tokens_M += np.array([len(sample_B) * records[0].num_patches, len(word_T)])
        self._grow_words(int(word_T.max(initial=-1)) + 1)
        self.words_W += np.bincount(word_T, minlength=len(self.words_W))
        for layer, record in enumerate(records):
            self._count(layer, record)
            self._count_words(layer, record, word_T)
            self._keep_patches(layer, record, sample_B)

    def _count(self, layer: int, record: RoutingRecord) -> None:
        split, num_experts = record.num_patch_tokens, self.load_LME.shape[2]
        shape = self.load_LME.shape[1:]
        is_text_N = (record.token_N >= split).long()
        cell_N = is_text_N * num_experts + record.expert_N

        def total(values_N: Tensor | None = None) -> Array:
            sums = torch.bincount(cell_N, values_N, minlength=shape[0] * shape[1])
            return sums.numpy().reshape(shape)

        self.load_LME[layer] += total()
        self.weight_LME[layer] += total(record.weight_N.double())
        self.entropy_LME[layer] += total(record.entropy_T.double()[record.token_N])

        assigned_TE = torch.zeros(len(record.entropy_T), num_experts)
        assigned_TE[record.token_N, record.expert_N] = 1.0
        for modality, tokens in enumerate((slice(0, split), slice(split, None))):
            self.entropy_LM[layer, modality] += float(record.entropy_T[tokens].double().sum())
            both_EE = assigned_TE[tokens].t() @ assigned_TE[tokens]
            self.coactivation_LMEE[layer, modality] += both_EE.round().long().numpy()

    def _count_words(self, layer: int, record: RoutingRecord, word_T: Array) -> None:
        is_text_N = record.token_N >= record.num_patch_tokens
        token_N = record.token_N[is_text_N].numpy() - record.num_patch_tokens
        num_experts, num_words = self.words_LEW.shape[1:]
        cell_N = record.expert_N[is_text_N].numpy() * num_words + word_T[token_N]
        counts = np.bincount(cell_N, minlength=num_experts * num_words)
        self.words_LEW[layer] += counts.reshape(num_experts, num_words).astype(np.int32)

    def _keep_patches(self, layer: int, record: RoutingRecord, sample_B: Array) -> None:
        """Keep the patches with the largest gate weights, at most one per image and expert."""
        num_experts, num_kept = self.load_LME.shape[2], self.patch_weight_LEX.shape[2]
        is_patch_N = record.token_N < record.num_patch_tokens
        weight_TE = torch.zeros(record.num_patch_tokens, num_experts)
        weight_TE[record.token_N[is_patch_N], record.expert_N[is_patch_N]] = record.weight_N[
            is_patch_N
        ]
        by_image = weight_TE.view(record.num_pairs, record.num_patches, num_experts)
        best_BE, index_BE = by_image.max(dim=1)

        candidates = (
            (self.patch_weight_LEX, best_BE.t().numpy()),
            (self.patch_sample_LEX, np.tile(sample_B, (num_experts, 1))),
            (self.patch_index_LEX, index_BE.t().numpy()),
        )
        merged = [np.concatenate([kept[layer], new], axis=1) for kept, new in candidates]
        # Stable: of equal weights the first one stays, so a patch of weight 0 fills no slot.
        order = np.argsort(-merged[0], axis=1, kind="stable")[:, :num_kept]
        for (kept, _), values in zip(candidates, merged, strict=True):
            kept[layer] = np.take_along_axis(values, order, axis=1)

    def _grow_words(self, num_words: int) -> None:
        """Make space for `num_words` words; at least doubled, so that copies are rare."""
        if num_words > len(self.words_W):
            added = max(num_words, 2 * len(self.words_W)) - len(self.words_W)
            self.words_W = np.pad(self.words_W, (0, added))
            self.words_LEW = np.pad(self.words_LEW, ((0, 0), (0, 0), (0, added)))
