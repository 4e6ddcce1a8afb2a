"""Counting what routers decide: hand-made choices with known answers, and a real model against its
own statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig
from pretrain.evaluate.routing.tally import Routed, Tally, watch
from pretrain.evaluate.routing.words import WordVocabulary, words_of
from pretrain.model import VisionLanguageModel
from pretrain.model.vision_language import RoutingFacts, valid_positions

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


def hand_made() -> Routed:
    """Two pairs of two patches and three text tokens in all; two of three experts a token."""
    chosen = [[0, 1], [0, 1], [0, 2], [1, 0], [2, 1], [2, 1], [2, 0]]
    weights = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    return Routed(
        torch.arange(7).repeat_interleave(2),
        torch.tensor(chosen).flatten(),
        torch.tensor(weights).flatten(),
        torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        num_pairs=2,
        num_patches=2,
    )


@pytest.fixture()
def tally() -> Tally:
    counted = Tally(1, 3, patches=2)
    counted.add([hand_made()], np.array([5, 0, 5]), np.array([70, 80]))
    return counted


def test_visits_weights_and_entropies_by_hand(tally: Tally) -> None:
    assert tally.tokens_M.tolist() == [4, 3]
    assert tally.visits_LME.tolist() == [[[4, 3, 1], [1, 2, 3]]]
    np.testing.assert_allclose(tally.weight_LME[0], [[2.4, 1.3, 0.3], [0.0, 1.0, 2.0]], rtol=1e-6)
    assert tally.entropy_LME.tolist() == [[[6, 4, 2], [6, 9, 15]]]
    assert tally.entropy_LM.tolist() == [[6, 15]]


def test_pairs_of_experts_by_hand(tally: Tally) -> None:
    assert tally.together_LMEE[0, 0].tolist() == [[4, 3, 1], [3, 3, 0], [1, 0, 1]]
    assert tally.together_LMEE[0, 1].tolist() == [[1, 0, 1], [0, 2, 2], [1, 2, 3]]


def test_words_by_hand(tally: Tally) -> None:
    assert tally.words_W[:6].tolist() == [1, 0, 0, 0, 0, 2]
    assert tally.words_LEW[0, :, [0, 5]].T.tolist() == [[0, 1], [1, 1], [1, 2]]
    assert tally.words_LEW.sum() == 6


def test_the_surest_patches_are_kept_one_of_a_picture(tally: Tally) -> None:
    # Expert 0 has patches 0 and 1 of the first picture (0.9, 0.6), 0 and 1 of the second (0.7,
    # 0.2).
    assert tally.patch_sample_LEX[0].tolist() == [[70, 80], [80, 70], [80, -1]]
    assert tally.patch_place_LEX[0, :2].tolist() == [[0, 0], [1, 1]]
    np.testing.assert_allclose(
        tally.patch_weight_LEX[0], [[0.9, 0.7], [0.8, 0.4], [0.3, 0.0]], rtol=1e-6
    )


def test_later_batches_add_up_and_take_the_place_of_less_sure_patches(tally: Tally) -> None:
    one = hand_made()
    stronger = one._replace(weight_N=one.weight_N * 2)
    tally.add([stronger], np.array([1, 2, 300]), np.array([90, 91]))
    assert tally.pairs == 4
    assert tally.visits_LME.tolist() == [[[8, 6, 2], [2, 4, 6]]]
    assert tally.patch_sample_LEX[0].tolist() == [[90, 91], [91, 80], [91, 80]]
    assert tally.words_W[[0, 1, 2, 5, 300]].tolist() == [1, 1, 1, 2, 1]
    assert tally.words_LEW[0, 2, [0, 1, 5, 300]].tolist() == [1, 1, 2, 1]


def batch(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pairs as the model reads them."""
    random = torch.Generator().manual_seed(pairs)
    lengths = torch.randint(3, 9, (pairs,), generator=random)
    ids = torch.randint(4, 64, (pairs, 8), generator=random)
    return (
        torch.randint(0, 256, (pairs, 3, 16, 16), generator=random, dtype=torch.uint8),
        ids,
        lengths,
        valid_positions(lengths, 8),
    )


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=4, expert_width=8),
        MoEConfig(num_experts=4, expert_width=8, top_k=1),
        MoEConfig(num_experts=4, expert_width=8, routing="expert"),
        MoEConfig(num_experts=4, expert_width=8, router_input="caption"),
        MoEConfig(num_experts=4, expert_width=8, pools="modality", score_func="sigmoid"),
        MoEConfig(num_experts=4, expert_width=8, routing="noisy_top_k", capacity_factor=1.0),
    ],
    ids=["top_k", "k=1", "expert", "caption", "pools", "noisy"],
)
def test_what_is_watched_is_what_the_model_did(moe: MoEConfig) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(SMALL, moe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.eval()
    tally, choices, coactivation, entropies = Tally(2, 4), 0, 0, 0
    with torch.no_grad(), watch(model) as seen:
        for pairs in (5, 3):
            inputs = batch(pairs)
            output = model(
                *inputs,
                RoutingFacts(torch.arange(pairs), torch.zeros(pairs).long(), 1, coactivation=True),
            )
            tally.add(seen, np.zeros(len(inputs[3]), dtype=np.int64), np.arange(pairs))
            choices, coactivation = (
                choices + output.router.choices_ME,
                coactivation + output.router.coactivation_EE,
            )
            entropies = entropies + output.router.entropy_sum_M
    assert np.array_equal(tally.visits_LME, choices)
    assert np.array_equal(tally.together_LMEE.sum(axis=1), coactivation)
    np.testing.assert_allclose(tally.entropy_LM, entropies, rtol=1e-4, atol=1e-4)


def test_watching_ends() -> None:
    model = VisionLanguageModel(SMALL, MoEConfig(num_experts=4, expert_width=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        with watch(model) as seen:
            model(*batch(2))
            assert len(seen) == 2
        seen.clear()
        model(*batch(2))
    assert seen == []


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
def test_pieces_are_joined_to_words(pieces: list[str], words: list[str]) -> None:
    assert words_of(pieces) == words


def test_words_are_numbered_as_they_come() -> None:
    class Letters:
        def piece(self, token: int) -> str:
            return ["<start>", "▁a", "▁b", "c"][token]

    book = WordVocabulary(Letters())
    assert book.numbers([0, 2, 3]).tolist() == [0, 1, 1]
    assert book.numbers([0, 1, 2]).tolist() == [0, 2, 3]
    assert book.words == ["<start>", "bc", "a", "b"]
