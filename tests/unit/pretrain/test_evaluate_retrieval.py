"""Retrieval metrics: ranks compared with sorting, chance level with enumeration."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from pretrain.evaluate.retrieval import chance, recall, retrieve, worst_ranks


def slow_rank(similarities: list[float], is_match: list[bool]) -> int:
    """Rank of the best match; ties rank before it."""
    order = sorted(range(len(is_match)), key=lambda c: (-similarities[c], is_match[c]))
    return 1 + next(rank for rank, c in enumerate(order) if is_match[c])


@pytest.mark.parametrize("seed", range(8))
def test_ranks_match_sorting(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are many ties.
    query, candidate = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (40, 30))
    group_Q = torch.randint(0, 5, (40,), generator=generator)
    group_C = torch.cat([torch.arange(5), torch.randint(0, 7, (25,), generator=generator)])
    expected = [
        slow_rank(similarities.tolist(), (group_C == group).tolist())
        for similarities, group in zip(query @ candidate.T, group_Q, strict=True)
    ]
    assert worst_ranks(query, candidate, group_Q, group_C).tolist() == expected


def test_ranks_do_not_depend_on_chunks() -> None:
    query, candidate = torch.randn(5000, 4), torch.randn(50, 4)
    group_Q, group_C = torch.arange(5000) % 50, torch.arange(50)
    ranks = worst_ranks(query, candidate, group_Q, group_C)
    chunks = [
        worst_ranks(query[i : i + 7], candidate, group_Q[i : i + 7], group_C)
        for i in range(0, 5000, 7)
    ]
    assert torch.equal(ranks, torch.cat(chunks))


def test_equal_captions_are_all_matches() -> None:
    # Images 0 and 1 have text 0. The image nearest to text 0 is image 1, a match.
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    result = retrieve(image, text, torch.tensor([0, 0, 1]))
    assert result.image_to_text["R@1"] == pytest.approx(
        100 * 2 / 3
    )  # text 1 ranks first for image 0
    assert result.text_to_image["R@1"] == 100.0
    assert result.image_to_text["R@5"] == 100.0


def test_constant_embeddings_have_no_recall() -> None:
    image, text = torch.ones(20, 4), torch.ones(20, 4)
    result = retrieve(image, text, torch.arange(20))
    assert result.image_to_text == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
    assert result.text_to_image == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def test_nan_embeddings_have_no_recall() -> None:
    image, text = torch.full((20, 4), torch.nan), torch.randn(20, 4)
    assert retrieve(image, text, torch.arange(20)).image_to_text["R@10"] == 0.0


def test_perfect_embeddings_have_full_recall() -> None:
    vectors = torch.eye(12)
    result = retrieve(vectors.repeat(3, 1), vectors, torch.arange(12).repeat(3))
    assert set(result.image_to_text.values()) == set(result.text_to_image.values()) == {100.0}


def test_labels_without_images_are_candidates_only() -> None:
    # The second label has no image. It ranks before the match and is not a query.
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    result = retrieve(image, text, torch.tensor([0]))
    assert result.image_to_text == {"R@1": 0.0, "R@5": 100.0, "R@10": 100.0}
    assert result.text_to_image["R@1"] == 100.0
    assert result.chance_image_to_text["R@1"] == 50.0
    assert result.chance_text_to_image["R@1"] == 100.0


@pytest.mark.parametrize("case", [(1, 6, 1), (2, 6, 3), (3, 5, 1), (1, 3, 5), (4, 4, 1)])
def test_chance_is_the_mean_over_all_permutations(case: tuple[int, int, int]) -> None:
    matches, candidates, k = case
    orders = list(itertools.permutations(range(candidates)))
    hits = sum(min(order[:k]) < matches for order in orders)
    assert chance([matches], candidates, [k])[f"R@{k}"] == pytest.approx(100 * hits / len(orders))


def test_chance_averages_over_queries() -> None:
    assert chance([1, 1, 4], 8, [2])["R@2"] == pytest.approx(
        sum(chance([matches], 8, [2])["R@2"] for matches in (1, 1, 4)) / 3
    )


def test_random_embeddings_are_near_chance() -> None:
    random.seed(0)
    torch.manual_seed(0)
    text_of_image = torch.tensor([random.randrange(60) for _ in range(4000)])
    result = retrieve(torch.randn(4000, 16), torch.randn(60, 16), text_of_image)
    assert result.image_to_text["R@5"] == pytest.approx(result.chance_image_to_text["R@5"], abs=3)


def test_recall_counts_ranks() -> None:
    assert recall(torch.tensor([1, 5, 6, 11])) == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0}
    assert recall(torch.zeros(0, dtype=torch.int64)) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
