"""Recall at k: the fraction of queries with a match among the k nearest candidates.

An image can have several captions, and several images an equal one, so a query can have any number
of matches; the nearest one counts. Candidates as similar as the best match rank before it: a model
that returns the same vector for everything has a recall of 0.

Shapes: Q queries, C candidates, N images, M distinct texts, R matching pairs, D embedding width.
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


def retrieve(image_ND: Tensor, text_MD: Tensor, matches_R2: Tensor) -> Retrieval:
    """Rank all texts for every image, and all images for every text that has any.

    Args:
        image_ND: Unit vectors, `[images, width]`.
        text_MD: Unit vectors of distinct texts, `[texts, width]`.
        matches_R2: Image index and text index of every matching pair, int64 `[pairs, 2]`, each pair
            once; every image has a text.
    """
    image_R, text_R = matches_R2.unbind(1)
    texts_of_image_N = torch.bincount(image_R, minlength=image_ND.shape[0])
    images_of_text_M = torch.bincount(text_R, minlength=text_MD.shape[0])
    is_query_M = images_of_text_M > 0  # other labels are candidates, but not queries
    query_of_text_M = is_query_M.cumsum(0) - 1
    to_text = worst_ranks(image_ND, text_MD, matches_R2)
    to_image = worst_ranks(
        text_MD[is_query_M], image_ND, torch.stack([query_of_text_M[text_R], image_R], dim=1)
    )
    return Retrieval(
        recall(to_text),
        recall(to_image),
        chance(texts_of_image_N.tolist(), text_MD.shape[0]),
        chance(images_of_text_M[is_query_M].tolist(), image_ND.shape[0]),
    )


def worst_ranks(query_QD: Tensor, candidate_CD: Tensor, matches_R2: Tensor) -> Tensor:
    """Rank of each query's best match, 1 for the nearest, int64 `[queries]`.

    `matches_R2` are query and candidate of every match; every query must have one. Ties and NaN
    similarities rank before the match.
    """
    ranks = [torch.zeros(0, dtype=torch.int64, device=query_QD.device)]
    for first in range(0, query_QD.shape[0], _QUERIES_PER_CHUNK):
        similarity_QC = query_QD[first : first + _QUERIES_PER_CHUNK] @ candidate_CD.T
        row_R, candidate_R = matches_R2[:, 0] - first, matches_R2[:, 1]
        in_chunk_R = (row_R >= 0) & (row_R < similarity_QC.shape[0])
        match_QC = torch.zeros_like(similarity_QC, dtype=torch.bool)
        match_QC[row_R[in_chunk_R], candidate_R[in_chunk_R]] = True

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
