"""Routing replay: a compared run uses the expert assignments of the reference.

Where two experts have nearly equal scores (a tie), rounding decides which one is selected, and then
all gradients differ. The reference therefore records the selection of every token in every step and
layer, and the compared run uses it instead of its own; weights, capacity and statistics still
follow from the run's own scores. How many of its own selections differ is counted and compared
apart.

Tokens are identified by the hash of (sample, modality, position), so a selection is found in any
micro-batch of any rank, and again when activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pretrain.model.vision_language import VisionLanguageModel


class RoutingReplay:
    """Records the selections of a model, or replaces them by recorded ones."""

    def __init__(
        self, model: VisionLanguageModel, recorded: Mapping[str, Tensor] | None = None
    ) -> None:
        """Attach to all MoE layers of a model.

        Args:
            model: The model; its layers call this object from now on.
            recorded: The `selections` of the reference; None records.
        """
        self.step = 0
        """Set before each step."""
        self.selections: dict[str, Tensor] = {}
        """`STEP/LAYER/hash`: hashes of the rows, ascending; `STEP/LAYER/indices`: their
        selections."""
        self._recorded = recorded
        self._num_different: dict[tuple[int, int], int] = {}
        model.needs_sample_ids = True
        for index, layer in enumerate(model.moe_layers()):
            layer.replace_selection = partial(self._replace, index)

    def pop_num_different(self) -> int:
        """Assignments of this rank since the last call in which its own selection differs."""
        total = sum(self._num_different.values())
        self._num_different = {}
        return total

    def _replace(self, layer: int, name: str, indices_RN: Tensor, hash_R: Tensor) -> Tensor:
        key = f"{self.step}/{layer}/{name}"
        if self._recorded is None:
            self._record(key, indices_RN, hash_R)
            return indices_RN

        hashes = self._recorded[f"{key}/hash"].to(hash_R.device)
        row_R = torch.searchsorted(hashes, hash_R).clamp(max=max(0, len(hashes) - 1))
        if not torch.equal(hashes[row_R], hash_R):
            raise RuntimeError(f"{key}: the reference has no selection for some of the tokens")
        expected_RN = self._recorded[f"{key}/indices"].to(hash_R.device)[row_R]
        self._count_different(layer, indices_RN, expected_RN, hash_R)
        return expected_RN

    def _record(self, key: str, indices_RN: Tensor, hash_R: Tensor) -> None:
        """Add the selections of a micro-batch; a repeated pass adds none."""
        hash_R, indices_RN = hash_R.cpu(), indices_RN.cpu()
        if f"{key}/hash" in self.selections:
            hash_R = torch.cat([self.selections[f"{key}/hash"], hash_R])
            indices_RN = torch.cat([self.selections[f"{key}/indices"], indices_RN])
        order_R = hash_R.argsort(stable=True)
        hash_R = hash_R[order_R]
        is_first_R = torch.ones_like(hash_R, dtype=torch.bool)
        is_first_R[1:] = hash_R[1:] != hash_R[:-1]
        self.selections[f"{key}/hash"] = hash_R[is_first_R]
        self.selections[f"{key}/indices"] = indices_RN[order_R][is_first_R]

    def _count_different(
        self, layer: int, actual_RN: Tensor, expected_RN: Tensor, hash_R: Tensor
    ) -> None:
        is_equal_RNM = actual_RN.unsqueeze(2) == expected_RN.unsqueeze(1)
        unexpected_R = (~is_equal_RNM.any(dim=2)).sum(dim=1)
        missed_R = (~is_equal_RNM.any(dim=1)).sum(dim=1)
        count_R = torch.maximum(unexpected_R, missed_R)
        if actual_RN.shape == expected_RN.shape:
            # The same experts in another order, which decides who comes first.
            count_R = torch.maximum(count_R, (actual_RN != expected_RN).any(dim=1).int())
        rows = count_R.nonzero().flatten()
        # By token, since the selections are computed again in a second pass or a recomputation.
        for token, count in zip(hash_R[rows].tolist(), count_R[rows].tolist(), strict=True):
            self._num_different[layer, token] = count
