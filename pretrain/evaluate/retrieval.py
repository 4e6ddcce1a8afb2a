"""Recall at k: the fraction of queries with a match among the k nearest candidates.

Every query and candidate has a group index, and candidates of the query's group are matches, so all
candidates with an equal caption count as correct. Candidates as similar as the best match rank
before it: a model that returns the same vector for everything has a recall of 0.

Shapes: Q queries, C candidates, N images, M distinct texts, D embedding width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)

Recalls = dict[str, float]
"""Percent by `R@k`."""

_QUERIES_PER_CHUNK = 2048


class Retrieval(NamedTuple):
    """Retrieval results of a set, in percent."""

    image_to_text: Recalls
    text_to_image: Recalls
    chance_image_to_text: Recalls
    chance_text_to_image: Recalls


def retrieve(image_ND: Tensor, text_MD: Tensor, text_of_image_N: Tensor) -> Retrieval:
    """Rank all texts for every image, and all images for every text that has any.

    Args:
        image_ND: Unit vectors, `[images, width]`.
        text_MD: Unit vectors of distinct texts, `[texts, width]`.
        text_of_image_N: Index of each image's text, int64 `[images]`.
    """
    texts_M = torch.arange(text_MD.shape[0], device=text_of_image_N.device)
    images_of_text_M = torch.bincount(text_of_image_N, minlength=text_MD.shape[0])
    has_images_M = images_of_text_M > 0  # other labels are candidates, but not queries
    to_text = worst_ranks(image_ND, text_MD, text_of_image_N, texts_M)
    to_image = worst_ranks(text_MD[has_images_M], image_ND, texts_M[has_images_M], text_of_image_N)
    return Retrieval(
        recall(to_text),
        recall(to_image),
        chance([1] * image_ND.shape[0], text_MD.shape[0]),
        chance(images_of_text_M[has_images_M].tolist(), image_ND.shape[0]),
    )


def worst_ranks(query_QD: Tensor, candidate_CD: Tensor, group_Q: Tensor, group_C: Tensor) -> Tensor:
    """Rank of each query's best match, 1 for the nearest, int64 `[queries]`.

    Every query must have a match. Ties and NaN similarities rank before the match.
    """
    ranks = [torch.zeros(0, dtype=torch.int64, device=query_QD.device)]
    for query, group in zip(
        query_QD.split(_QUERIES_PER_CHUNK), group_Q.split(_QUERIES_PER_CHUNK), strict=True
    ):
        similarity_QC = query @ candidate_CD.T
        match_QC = group[:, None] == group_C[None, :]
        best_Q = similarity_QC.masked_fill(~match_QC, -torch.inf).amax(dim=1)
        # "Not less" instead of "greater or equal": comparisons with NaN are false, and NaN must
        # not improve the rank.
        ahead_QC = ~(similarity_QC < best_Q[:, None]) & ~match_QC
        ranks.append(1 + ahead_QC.sum(dim=1))
    return torch.cat(ranks)


def recall(ranks_Q: Tensor, at: Sequence[int] = RECALL_AT) -> Recalls:
    """Percentage of queries with a match within the first k; 0 without queries."""
    total = max(1, ranks_Q.numel())
    return {f"R@{k}": 100 * int((ranks_Q <= k).sum()) / total for k in at}


def chance(
    matches_per_query: Iterable[int], candidates: int, at: Sequence[int] = RECALL_AT
) -> Recalls:
    """Expected recall of a random order, exactly.

    For a query with r matches among C candidates, none of the first k is a match with probability
    binomial(C - r, k) / binomial(C, k).

    Args:
        matches_per_query: Number of matches of each query.
        candidates: Number of candidates, the same for all queries.
        at: Values of k.
    """
    queries_by_matches = Counter(matches_per_query)
    total = max(1, queries_by_matches.total())
    return {f"R@{k}": 100 * _expected_hits(queries_by_matches, candidates, k) / total for k in at}


def _expected_hits(queries_by_matches: Counter[int], candidates: int, k: int) -> float:
    k = min(k, candidates)
    combinations = math.comb(candidates, k)
    return sum(
        queries * (1 - math.comb(candidates - matches, k) / combinations)
        for matches, queries in queries_by_matches.items()
    )
