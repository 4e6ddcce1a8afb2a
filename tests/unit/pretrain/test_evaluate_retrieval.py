"""Retrieval metrics: ranks compared with sorting, chance level with enumeration."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.evaluate import retrieval
from pretrain.evaluate.evaluator import distinct_texts
from pretrain.evaluate.retrieval import chance, recall, retrieve, worst_ranks


def pairs(text_of_image: Tensor) -> Tensor:
    """Matching pairs if every image has one text."""
    return torch.stack([torch.arange(len(text_of_image)), text_of_image], dim=1)


def slow_rank(similarities: list[float], is_match: list[bool]) -> int:
    """Rank of the best match; ties rank before it."""
    order = sorted(range(len(is_match)), key=lambda c: (-similarities[c], is_match[c]))
    return 1 + next(rank for rank, c in enumerate(order) if is_match[c])


@pytest.mark.parametrize("seed", range(8))
def test_ranks_match_sorting(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are many ties.
    query, candidate = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (40, 30))
    is_match = torch.rand(40, 30, generator=generator) < 0.1
    is_match[torch.arange(40), torch.randint(0, 30, (40,), generator=generator)] = True
    expected = [
        slow_rank(similarities.tolist(), row.tolist())
        for similarities, row in zip(query @ candidate.T, is_match, strict=True)
    ]
    assert worst_ranks(query, candidate, is_match.nonzero()).tolist() == expected


def test_ranks_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, candidate = torch.randn(500, 4), torch.randn(50, 4)
    matches = pairs(torch.arange(500) % 50)
    matches = torch.cat([matches, pairs(torch.arange(500) * 7 % 50 ^ 1)])[torch.randperm(1000)]
    matches = matches[matches[:, 1] < 50]
    ranks = worst_ranks(query, candidate, matches)
    monkeypatch.setattr(retrieval, "_QUERIES_PER_CHUNK", 7)
    assert torch.equal(ranks, worst_ranks(query, candidate, matches))


def slow_recall(
    queries: list[list[float]], candidates: list[list[float]], matches: list[set[int]], k: int
) -> float:
    """Percentage of queries with one of their matches among the k most similar candidates."""
    hits = 0
    for query, own in zip(queries, matches, strict=True):
        similarities = [float(np.dot(query, candidate)) for candidate in candidates]
        order = sorted(range(len(candidates)), key=lambda c: -similarities[c])
        hits += any(candidate in own for candidate in order[:k])
    return 100 * hits / len(queries)


@pytest.mark.parametrize("seed", range(4))
def test_several_captions_equal_a_loop_over_lists(seed: int) -> None:
    """Each image has one to five captions, some of which other images or itself have too; some of
    the candidates are captions of no image."""
    numbers = np.random.default_rng(seed)
    captions = [[str(n) for n in numbers.integers(60, size=1 + i % 5)] for i in range(40)]
    labels = [str(n) for n in numbers.permutation(70)]
    images, vectors = (numbers.normal(size=(n, 8)).astype("f4") for n in (40, 70))
    texts, matches = distinct_texts(captions, labels)
    result = retrieve(torch.tensor(images), torch.tensor(vectors), torch.tensor(matches))

    texts_of_image = [{texts.index(text) for text in own} for own in captions]
    images_of_text = [{i for i, own in enumerate(captions) if text in own} for text in texts]
    queries = [text for text in range(70) if images_of_text[text]]
    for k in (1, 5, 10):
        to_text = slow_recall(images.tolist(), vectors.tolist(), texts_of_image, k)
        to_image = slow_recall(
            vectors[queries].tolist(), images.tolist(), [images_of_text[t] for t in queries], k
        )
        assert result.image_to_text[f"R@{k}"] == pytest.approx(to_text)
        assert result.text_to_image[f"R@{k}"] == pytest.approx(to_image)
    assert result.chance_image_to_text["R@1"] == pytest.approx(
        100 * sum(map(len, texts_of_image)) / (40 * 70)
    )


def test_equal_captions_are_all_matches() -> None:
    # Images 0 and 1 have text 0. The image nearest to text 0 is image 1, a match.
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    result = retrieve(image, text, pairs(torch.tensor([0, 0, 1])))
    assert result.image_to_text["R@1"] == pytest.approx(
        100 * 2 / 3
    )  # text 1 ranks first for image 0
    assert result.text_to_image["R@1"] == 100.0
    assert result.image_to_text["R@5"] == 100.0


def test_constant_embeddings_have_no_recall() -> None:
    image, text = torch.ones(20, 4), torch.ones(20, 4)
    result = retrieve(image, text, pairs(torch.arange(20)))
    assert result.image_to_text == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
    assert result.text_to_image == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def test_nan_embeddings_have_no_recall() -> None:
    image, text = torch.full((20, 4), torch.nan), torch.randn(20, 4)
    assert retrieve(image, text, pairs(torch.arange(20))).image_to_text["R@10"] == 0.0


def test_perfect_embeddings_have_full_recall() -> None:
    vectors = torch.eye(12)
    result = retrieve(vectors.repeat(3, 1), vectors, pairs(torch.arange(12).repeat(3)))
    assert set(result.image_to_text.values()) == set(result.text_to_image.values()) == {100.0}


def test_labels_without_images_are_candidates_only() -> None:
    # The second label has no image. It ranks before the match and is not a query.
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    result = retrieve(image, text, pairs(torch.tensor([0])))
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
    result = retrieve(torch.randn(4000, 16), torch.randn(60, 16), pairs(text_of_image))
    assert result.image_to_text["R@5"] == pytest.approx(result.chance_image_to_text["R@5"], abs=3)


def test_recall_counts_ranks() -> None:
    assert recall(torch.tensor([1, 5, 6, 11])) == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0}
    assert recall(torch.zeros(0, dtype=torch.int64)) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
