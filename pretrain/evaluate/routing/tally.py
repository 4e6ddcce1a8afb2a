"""Counts what experts are sent, batch by batch, while a model judges.

`watch` notes what every router decides; `Tally.add` counts it. Nothing is kept per token, so any
number of samples may pass.

Shapes: L MoE layers, M modalities (0 image, 1 text), E experts, T tokens, N token choices, B pairs,
P patches, W words, X patches kept of each expert.
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
from pretrain.moe.tokens import MODALITIES, RouterTokens

Array = np.ndarray[Any, Any]


class Routed(NamedTuple):
    """What one router did with one batch; on the host."""

    token_N: Tensor
    """Token of each choice, int64; the patches of all pairs come first, then their text tokens."""
    expert_N: Tensor
    """Its expert, int64."""
    weight_N: Tensor
    """Its gate weight, float32."""
    entropy_T: Tensor
    """Entropy (nats) of each token's scores, normalized over the experts."""
    num_pairs: int
    num_patches: int
    """Of each pair."""


@contextmanager
def watch(model: VisionLanguageModel) -> Iterator[list[Routed]]:
    """A list that holds, after each forward pass in evaluation mode, what each sparse layer's
    router did."""
    seen: list[Routed] = []
    layers = model.moe_layers()

    def note(layer: nn.Module, inputs: tuple[Tensor, RouterTokens], _: Any) -> None:
        assert isinstance(layer, MoELayer) and not layer.training, (
            "only judging decides the same twice"
        )
        if layer is layers[0]:
            seen.clear()
        seen.append(routed(layer, *inputs))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def routed(layer: MoELayer, x_TD: Tensor, tokens: RouterTokens) -> Routed:
    """Ask a layer's router once more; in evaluation mode it decides the same."""
    _, scored, routing = layer.route(x_TD, tokens)
    probs_TE = scored.scores_TE / scored.scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    token_N = routing.token_N
    if token_N is None:
        token_N = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(routing.k)
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    return Routed(
        token_N.cpu(),
        routing.expert_ids_N.cpu(),
        routing.weights_N.detach().cpu(),
        entropy_T.detach().cpu(),
        tokens.num_pairs,
        tokens.num_patches,
    )


class Tally:
    """Sums over everything that was added; the fields are read when all is counted."""

    def __init__(self, num_layers: int, num_experts: int, *, patches: int = 4) -> None:
        """Begin.

        Args:
            num_layers: Sparse layers.
            num_experts: Routed experts of each.
            patches: Patches to keep of each expert.
        """
        self.pairs = 0
        self.tokens_M: Array = np.zeros(len(MODALITIES), dtype=np.int64)
        grid = (num_layers, len(MODALITIES), num_experts)
        self.visits_LME: Array = np.zeros(grid, dtype=np.int64)
        """Tokens that visit the expert."""
        self.weight_LME: Array = np.zeros(grid)
        """Sum of their gate weights."""
        self.entropy_LME: Array = np.zeros(grid)
        """Sum of the entropies of their scores."""
        self.entropy_LM: Array = np.zeros(grid[:2])
        """The same over all tokens, each once."""
        self.together_LMEE: Array = np.zeros((*grid, num_experts), dtype=np.int64)
        """Tokens that visit both experts; each with itself on the diagonal."""
        self.words_W: Array = np.zeros(0, dtype=np.int64)
        """Text tokens of each word."""
        self.words_LEW: Array = np.zeros((num_layers, num_experts, 0), dtype=np.int32)
        """Those that visit the expert."""
        kept = (num_layers, num_experts, patches)
        self.patch_weight_LEX: Array = np.zeros(kept, dtype=np.float32)
        """Gate weight of the patches kept, falling; 0 where there is none."""
        self.patch_sample_LEX: Array = np.full(kept, -1, dtype=np.int64)
        self.patch_place_LEX: Array = np.zeros(kept, dtype=np.int64)

    def add(self, seen: Sequence[Routed], word_T: Array, sample_B: Array) -> None:
        """Count one batch.

        Args:
            seen: Of each layer.
            word_T: Word of each text token, int64.
            sample_B: Number of each pair, by which its picture is found again, int64.
        """
        self.pairs += len(sample_B)
        self.tokens_M += np.array([len(sample_B) * seen[0].num_patches, len(word_T)])
        self._make_room(int(word_T.max(initial=-1)) + 1)
        self.words_W += np.bincount(word_T, minlength=len(self.words_W))
        for layer, one in enumerate(seen):
            self._count(layer, one)
            self._count_words(layer, one, word_T)
            self._keep_patches(layer, one, sample_B)

    def _count(self, layer: int, one: Routed) -> None:
        border, experts = one.num_pairs * one.num_patches, self.visits_LME.shape[2]
        is_text_N = (one.token_N >= border).long()
        cell_N = is_text_N * experts + one.expert_N
        shape = self.visits_LME.shape[1:]

        def total(values_N: Tensor | None = None) -> Array:
            return (
                torch.bincount(cell_N, values_N, minlength=shape[0] * shape[1])
                .numpy()
                .reshape(shape)
            )

        self.visits_LME[layer] += total()
        self.weight_LME[layer] += total(one.weight_N.double())
        self.entropy_LME[layer] += total(one.entropy_T.double()[one.token_N])
        chosen_TE = torch.zeros(len(one.entropy_T), experts)
        chosen_TE[one.token_N, one.expert_N] = 1.0
        for modality, part in enumerate((slice(0, border), slice(border, None))):
            self.entropy_LM[layer, modality] += float(one.entropy_T[part].double().sum())
            both_EE = chosen_TE[part].t() @ chosen_TE[part]
            self.together_LMEE[layer, modality] += both_EE.round().long().numpy()

    def _count_words(self, layer: int, one: Routed, word_T: Array) -> None:
        is_text_N = one.token_N >= one.num_pairs * one.num_patches
        token_N = one.token_N[is_text_N].numpy() - one.num_pairs * one.num_patches
        experts, words = self.words_LEW.shape[1:]
        cell_N = one.expert_N[is_text_N].numpy() * words + word_T[token_N]
        self.words_LEW[layer] += (
            np.bincount(cell_N, minlength=experts * words).reshape(experts, words).astype(np.int32)
        )

    def _keep_patches(self, layer: int, one: Routed, sample_B: Array) -> None:
        """The patches with the largest gate weights, of each picture at most one for an expert."""
        pairs, patches, experts = one.num_pairs, one.num_patches, self.visits_LME.shape[2]
        is_patch_N = one.token_N < pairs * patches
        weight_TE = torch.zeros(pairs * patches, experts)
        weight_TE[one.token_N[is_patch_N], one.expert_N[is_patch_N]] = one.weight_N[is_patch_N]
        best_BE, place_BE = weight_TE.view(pairs, patches, experts).max(dim=1)
        weights = np.concatenate([self.patch_weight_LEX[layer], best_BE.t().numpy()], axis=1)
        samples = np.concatenate(
            [self.patch_sample_LEX[layer], np.tile(sample_B, (experts, 1))], axis=1
        )
        places = np.concatenate([self.patch_place_LEX[layer], place_BE.t().numpy()], axis=1)
        # Stable: of equal ones the first seen stays, so a patch of weight 0 does not take an empty
        # place.
        order = np.argsort(-weights, axis=1, kind="stable")[:, : self.patch_weight_LEX.shape[2]]
        for field, values in (
            (self.patch_weight_LEX, weights),
            (self.patch_sample_LEX, samples),
            (self.patch_place_LEX, places),
        ):
            field[layer] = np.take_along_axis(values, order, axis=1)

    def _make_room(self, words: int) -> None:
        """Space for so many words; at least doubled, so that it is seldom made."""
        if words > len(self.words_W):
            more = max(words, 2 * len(self.words_W)) - len(self.words_W)
            self.words_W = np.pad(self.words_W, (0, more))
            self.words_LEW = np.pad(self.words_LEW, ((0, 0), (0, 0), (0, more)))
