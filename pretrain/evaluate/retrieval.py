"""Recall at k: of all queries, how many find a right answer among their k nearest candidates.

Queries and candidates carry a group number, and a candidate of the query's own group is a right
answer, so equal captions are all right. Candidates as near as the right one count as nearer: a
model that gives the same vector for everything gets nothing for it.

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

_QUERIES_AT_ONCE = 2048


class Retrieval(NamedTuple):
    """What a set says about the embeddings, all in percent."""

    image_to_text: Recalls
    text_to_image: Recalls
    chance_image_to_text: Recalls
    chance_text_to_image: Recalls


def retrieve(image_ND: Tensor, text_MD: Tensor, text_of_image_N: Tensor) -> Retrieval:
    """Rank texts for every image, and images for every text that has some.

    Args:
        image_ND: Unit vectors, `[images, width]`.
        text_MD: Unit vectors of distinct texts, `[texts, width]`.
        text_of_image_N: Which text is the image's own, int64 `[images]`.
    """
    texts_M = torch.arange(text_MD.shape[0], device=text_of_image_N.device)
    images_of_text_M = torch.bincount(text_of_image_N, minlength=text_MD.shape[0])
    asked = images_of_text_M > 0  # labels without a picture are candidates, but no questions
    to_text = worst_ranks(image_ND, text_MD, text_of_image_N, texts_M)
    to_image = worst_ranks(text_MD[asked], image_ND, texts_M[asked], text_of_image_N)
    return Retrieval(
        recall(to_text),
        recall(to_image),
        chance([1] * image_ND.shape[0], text_MD.shape[0]),
        chance(images_of_text_M[asked].tolist(), image_ND.shape[0]),
    )


def worst_ranks(query_QD: Tensor, candidate_CD: Tensor, group_Q: Tensor, group_C: Tensor) -> Tensor:
    """Rank of each query's best right answer, 1 for the nearest, int64 `[queries]`.

    Every query must have a right answer. Ties, and similarities that are not numbers, count against
    the query.
    """
    ranks = [torch.zeros(0, dtype=torch.int64, device=query_QD.device)]
    for query, group in zip(
        query_QD.split(_QUERIES_AT_ONCE), group_Q.split(_QUERIES_AT_ONCE), strict=True
    ):
        similarity_QC = query @ candidate_CD.T
        right_QC = group[:, None] == group_C[None, :]
        best_Q = similarity_QC.masked_fill(~right_QC, -torch.inf).amax(dim=1)
        # "Not below" instead of "at least": comparisons with NaN are false, and must not help.
        ahead_QC = ~(similarity_QC < best_Q[:, None]) & ~right_QC
        ranks.append(1 + ahead_QC.sum(dim=1))
    return torch.cat(ranks)


def recall(ranks_Q: Tensor, at: Sequence[int] = RECALL_AT) -> Recalls:
    """Percent of queries whose right answer is within the first k; 0 without queries."""
    total = max(1, ranks_Q.numel())
    return {f"R@{k}": 100 * int((ranks_Q <= k).sum()) / total for k in at}


def chance(
    right_of_query: Iterable[int], candidates: int, at: Sequence[int] = RECALL_AT
) -> Recalls:
    """Expected recall of a random order, exactly.

    A query with r right answers among C candidates misses all of them in its first k with
    probability C(C - r, k) / C(C, k).

    Args:
        right_of_query: Right answers of each query.
        candidates: Candidates that every query ranks.
        at: The k's.
    """
    queries_by_right = Counter(right_of_query)
    total = max(1, queries_by_right.total())
    return {f"R@{k}": 100 * _hits(queries_by_right, candidates, k) / total for k in at}


def _hits(queries_by_right: Counter[int], candidates: int, k: int) -> float:
    drawn = min(k, candidates)
    ways = math.comb(candidates, drawn)
    return sum(
        queries * (1 - math.comb(candidates - right, drawn) / ways)
        for right, queries in queries_by_right.items()
    )
