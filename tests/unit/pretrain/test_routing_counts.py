"""Counting of assignments: hand-made records with known counts, and a real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig
from pretrain.evaluate.routing.counts import RoutingCounts, RoutingRecord, record_routing
from pretrain.evaluate.routing.words import WordVocabulary, words_of
from pretrain.model import VisionLanguageModel
from pretrain.model.vision_language import valid_positions

SMALL = ModelConfig(
    width=32,
    num_layers=3,
    num_heads=2,
    pool_heads=2,
    ffn_width=32,
    fusion_layer=1,
    image_size=16,
    patch_size=8,
    vocab_size=64,
    context_length=8,
    embed_dim=16,
)


def make_record() -> RoutingRecord:
    """Two pairs with two patches each and three text tokens; two of three experts per token."""
    experts = [[0, 1], [0, 1], [0, 2], [1, 0], [2, 1], [2, 1], [2, 0]]
    weights = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    return RoutingRecord(
        torch.arange(7).repeat_interleave(2),
        torch.tensor(experts).flatten(),
        torch.tensor(weights).flatten(),
        torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        num_pairs=2,
        num_patches=2,
    )


@pytest.fixture
def counts() -> RoutingCounts:
    counts = RoutingCounts(1, 3, patches=2)
    counts.add([make_record()], np.array([5, 0, 5]), np.array([70, 80]))
    return counts


def test_loads_weights_and_entropies(counts: RoutingCounts) -> None:
    assert counts.tokens_M.tolist() == [4, 3]
    assert counts.load_LME.tolist() == [[[4, 3, 1], [1, 2, 3]]]
    np.testing.assert_allclose(counts.weight_LME[0], [[2.4, 1.3, 0.3], [0.0, 1.0, 2.0]], rtol=1e-6)
    assert counts.entropy_LME.tolist() == [[[6, 4, 2], [6, 9, 15]]]
    assert counts.entropy_LM.tolist() == [[6, 15]]


def test_coactivation(counts: RoutingCounts) -> None:
    assert counts.coactivation_LMEE[0, 0].tolist() == [[4, 3, 1], [3, 3, 0], [1, 0, 1]]
    assert counts.coactivation_LMEE[0, 1].tolist() == [[1, 0, 1], [0, 2, 2], [1, 2, 3]]


def test_words(counts: RoutingCounts) -> None:
    assert counts.words_W[:6].tolist() == [1, 0, 0, 0, 0, 2]
    assert counts.words_LEW[0, :, [0, 5]].T.tolist() == [[0, 1], [1, 1], [1, 2]]
    assert counts.words_LEW.sum() == 6


def test_patches_with_the_largest_weights_are_kept(counts: RoutingCounts) -> None:
    # Weights of expert 0: 0.9 and 0.6 for the first image, 0.7 and 0.2 for the second.
    assert counts.patch_sample_LEX[0].tolist() == [[70, 80], [80, 70], [80, -1]]
    assert counts.patch_index_LEX[0, :2].tolist() == [[0, 0], [1, 1]]
    np.testing.assert_allclose(
        counts.patch_weight_LEX[0], [[0.9, 0.7], [0.8, 0.4], [0.3, 0.0]], rtol=1e-6
    )


def test_batches_are_added(counts: RoutingCounts) -> None:
    record = make_record()
    larger_weights = record._replace(weight_N=record.weight_N * 2)
    counts.add([larger_weights], np.array([1, 2, 300]), np.array([90, 91]))
    assert counts.pairs == 4
    assert counts.load_LME.tolist() == [[[8, 6, 2], [2, 4, 6]]]
    assert counts.patch_sample_LEX[0].tolist() == [[90, 91], [91, 80], [91, 80]]
    assert counts.words_W[[0, 1, 2, 5, 300]].tolist() == [1, 1, 1, 2, 1]
    assert counts.words_LEW[0, 2, [0, 1, 5, 300]].tolist() == [1, 1, 2, 1]


def make_inputs(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pairs as inputs of the model."""
    random = torch.Generator().manual_seed(pairs)
    lengths = torch.randint(3, 9, (pairs,), generator=random)
    ids = torch.randint(4, 64, (pairs, 8), generator=random)
    images = torch.randint(0, 256, (pairs, 3, 16, 16), generator=random, dtype=torch.uint8)
    return images, ids, lengths, valid_positions(lengths, 8)


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=4, expert_width=8),
        MoEConfig(num_experts=4, expert_width=8, top_k=1),
        MoEConfig(num_experts=4, expert_width=8, routing="expert_choice"),
        MoEConfig(num_experts=4, expert_width=8, router_input="caption"),
        MoEConfig(num_experts=4, expert_width=8, pools="modality", score_func="sigmoid"),
        MoEConfig(num_experts=4, expert_width=8, routing="noisy_top_k", capacity_factor=1.0),
    ],
    ids=["top_k", "k=1", "expert_choice", "caption", "pools", "noisy"],
)
def test_counts_equal_the_statistics_of_the_model(moe: MoEConfig) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(SMALL, moe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.eval()

    counts, stats = RoutingCounts(2, 4), []
    with torch.no_grad(), record_routing(model) as records:
        for pairs in (5, 3):
            inputs = make_inputs(pairs)
            groups = torch.zeros(pairs).long()
            tokens = model.token_batch(inputs[1], inputs[3]).with_sample_ids(torch.arange(pairs))
            tokens = tokens.with_capacity_groups(groups, 1)._replace(coactivation=True)
            stats.append(model(*inputs[:3], tokens).router)
            counts.add(records, np.zeros(len(inputs[3]), dtype=np.int64), np.arange(pairs))

    first, second = stats
    assert np.array_equal(counts.load_LME, first.assignments_ME + second.assignments_ME)
    coactivation = first.coactivation_EE + second.coactivation_EE
    assert np.array_equal(counts.coactivation_LMEE.sum(axis=1), coactivation)
    entropies = first.entropy_sum_M + second.entropy_sum_M
    np.testing.assert_allclose(counts.entropy_LM, entropies, rtol=1e-4, atol=1e-4)


def run_model(model: VisionLanguageModel, inputs: tuple[torch.Tensor, ...]) -> None:
    images, ids, lengths, positions = inputs
    model(images, ids, lengths, model.token_batch(ids, positions))


def test_recording_ends_with_the_context() -> None:
    model = VisionLanguageModel(SMALL, MoEConfig(num_experts=4, expert_width=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        with record_routing(model) as records:
            run_model(model, make_inputs(2))
            assert len(records) == 2
        records.clear()
        run_model(model, make_inputs(2))
    assert records == []


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (
            ["<start>", "▁a", "▁red", "▁fo", "x", "<end>"],
            ["<start>", "a", "red", "fox", "fox", "<end>"],
        ),
        (
            ["<start>", "▁caf", "<0xC3>", "<0xA9>", "<end>"],
            ["<start>", "café", "café", "café", "<end>"],
        ),
        (["<start>", "un", "even", "<end>"], ["<start>", "uneven", "uneven", "<end>"]),
        (["▁", "<0xC3>"], ["\N{REPLACEMENT CHARACTER}"] * 2),
        (["▁" + "x" * 20, "y" * 20, "▁b"], ["x" * 20, "y" * 20, "b"]),
        (["▁"], ["▁"]),
        ([], []),
    ],
)
def test_tokens_are_joined_to_words(pieces: list[str], words: list[str]) -> None:
    assert words_of(pieces) == words


def test_word_indices_are_in_order_of_appearance() -> None:
    class LetterTokenizer:
        def piece(self, token: int) -> str:
            return ["<start>", "▁a", "▁b", "c"][token]

    vocabulary = WordVocabulary(LetterTokenizer())
    assert vocabulary.word_indices([0, 2, 3]).tolist() == [0, 1, 1]
    assert vocabulary.word_indices([0, 1, 2]).tolist() == [0, 2, 3]
    assert vocabulary.words == ["<start>", "bc", "a", "b"]
