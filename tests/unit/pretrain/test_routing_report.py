"""Statistics of experts from counts with known answers, and the text table."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.report import (
    effective_num_experts,
    modality_preference,
    routing_report,
    top_words,
    word_bits,
)
from pretrain.evaluate.routing.text_table import preference_text, replace_control, routing_table
from tests.unit.pretrain.routing_support import specialists

WORDS = ["sky", "sea"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def test_modality_preference_compares_fractions() -> None:
    assert modality_preference(0.25, 0.25) == 0
    assert modality_preference(0.5, 0.0) == -1
    assert modality_preference(0.0, 0.1) == 1
    assert modality_preference(0.1, 0.3) == pytest.approx(0.5)
    assert modality_preference(0.0, 0.0) is None


def test_word_bits_are_the_divergence_above_chance() -> None:
    base_W = np.array([5000, 5000, 5000, 5000])
    one_of_four = word_bits(np.array([4000, 0, 0, 0]), base_W)
    assert one_of_four == pytest.approx(2.0, abs=0.01)
    assert word_bits(np.array([1000, 1000, 1000, 1000]), base_W) == 0
    assert word_bits(np.zeros(4, dtype=np.int64), base_W) is None


def test_word_bits_of_random_words_are_near_zero() -> None:
    random = np.random.default_rng(1)
    base_W = np.full(200, 1000)
    bits = [word_bits(random.multinomial(400, np.ones(200) / 200), base_W) for _ in range(20)]
    # 0.36 without the correction.
    assert np.mean([value for value in bits if value is not None]) < 0.1


@pytest.mark.parametrize("tokens", [10, 60])
def test_word_bits_of_few_tokens(tokens: int) -> None:
    base_W = np.full(900, 60)
    one_word = np.zeros(900, dtype=np.int64)
    one_word[5] = tokens
    bits = word_bits(one_word, base_W)
    assert bits is not None and 2 < bits < np.log2(900)

    random = np.random.default_rng(1)
    sampled = [
        word_bits(random.multivariate_hypergeometric(base_W, tokens), base_W) for _ in range(20)
    ]
    # 6.5 and 3.9 without the correction.
    assert np.mean([value for value in sampled if value is not None]) < 0.05
    assert word_bits(base_W, base_W) == 0


def test_words_are_ranked_by_their_contribution() -> None:
    words = ["cat", "dog", "rare", "the"]
    base_W = np.array([100, 100, 10, 790])
    cat, rare = top_words(np.array([50, 5, 10, 35]), base_W, words, 5)
    assert cat == {"word": "cat", "count": 50, "lift": 5.0}
    assert (rare["word"], rare["lift"]) == ("rare", 10.0)


def test_words_near_chance_or_with_few_tokens_are_not_listed() -> None:
    lift_below_minimum = np.array([110, 90])
    assert top_words(lift_below_minimum, np.array([1000, 1000]), ["so", "so-so"], 5) == []
    too_few = np.array([2, 0, 0, 0])
    assert top_words(too_few, np.array([100, 100, 10, 790]), ["cat", "dog", "rare", "the"], 5) == []


def test_effective_number_of_experts() -> None:
    assert effective_num_experts(np.array([7, 7, 7, 7])) == pytest.approx(4)
    assert effective_num_experts(np.array([9, 0, 0])) == pytest.approx(1)


def test_report_of_specialized_experts() -> None:
    report = routing_report(specialists(), WORDS, MoEConfig(num_experts=4), (1, 3))
    layer = report["layers"][0]
    assert layer["block"] == 1
    assert [expert["modality_preference"] for expert in layer["experts"]] == [-1, -1, 1, 1]
    assert layer["experts"][0]["token_fraction"] == {"image": 1.0, "text": 0.0}
    assert layer["experts"][2]["weight"] == pytest.approx(0.5)
    assert layer["experts"][2]["entropy"] == pytest.approx(1.2)
    assert layer["experts"][0]["words"] == [] and layer["experts"][0]["word_bits"] is None
    assert layer["load"]["image"] == {
        "uniform_fraction": 0.5,
        "max_over_mean": 2.0,
        "min_over_mean": 0.0,
        "effective_experts": pytest.approx(2),
        "entropy": pytest.approx(1.2),
    }


def test_report_of_unspecialized_experts() -> None:
    report = routing_report(specialists(), WORDS, MoEConfig(num_experts=4), (1, 3))
    layer = report["layers"][1]
    assert layer["block"] == 3
    assert [expert["specialization"] for expert in layer["experts"]] == [0, 0, 0, 0]
    assert layer["load"]["text"]["max_over_mean"] == 1.0
    assert layer["load"]["text"]["entropy"] == pytest.approx(0.7)
    words = [[word["word"] for word in expert["words"]] for expert in layer["experts"]]
    assert words == [["sky"], ["sky"], ["sea"], ["sea"]]


def test_load_of_pools_is_relative_to_the_pool() -> None:
    moe = MoEConfig(num_experts=4, pools="modality")
    report = routing_report(specialists(), WORDS, moe, (1, 3))
    load = report["layers"][0]["load"]
    assert load["image"]["uniform_fraction"] == load["text"]["uniform_fraction"] == 1.0
    assert load["image"]["max_over_mean"] == load["image"]["min_over_mean"] == 1.0
    assert "image 100.0%, text 100.0%" in routing_table(report)


def test_table_lists_each_expert() -> None:
    report = routing_report(specialists(), WORDS, MoEConfig(num_experts=4), (1, 3))
    table = routing_table(report)
    lines = table.splitlines()
    assert lines[0] == "layer 01"
    for part in ("image", "2.00 x mean", "0.00 x mean", "2.0 effective experts", "1.20 nats"):
        assert part in lines[1]
    row = next(line for line in lines if line.split()[:1] == ["2"])
    assert row.split() == ["2", "0.0%", "100.0%", "text", "1.00", "0.50", "1.20", "0.00"]
    assert any(line.endswith("sea x2.0") for line in lines)
    assert "image 50.0%, text 50.0%" in table


def test_control_characters_are_replaced() -> None:
    assert replace_control("a\x1b[2Jb\u202e") == f"a{REPLACEMENT}[2Jb{REPLACEMENT}"


@pytest.mark.parametrize(
    ("preference", "text"),
    [
        (None, "no tokens"),
        (0.01, "both"),
        (-0.06, "image 0.06"),
        (-0.5, "image 0.50"),
        (1.0, "text 1.00"),
    ],
)
def test_preference_as_text(preference: float | None, text: str) -> None:
    assert preference_text(preference) == text
