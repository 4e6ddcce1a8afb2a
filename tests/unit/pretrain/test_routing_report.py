"""Numbers about experts, from counts whose answers are known; grids and the table that show
them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import ImageFont

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.figure import (
    FAIR,
    FONT_SIZE,
    HEAD,
    LABEL,
    LESS,
    MARGIN,
    MORE,
    NARROWEST,
    NOTHING,
    SHEET,
    cell_side,
    draw_grids,
    shade,
)
from pretrain.evaluate.routing.grids import (
    Grid,
    coactivation_grids,
    coactivation_lift,
    expected_coactivation,
    load_grids,
    over_fair_share,
)
from pretrain.evaluate.routing.report import (
    coactivated_pairs,
    effective_number,
    modality_lean,
    routing_report,
    top_words,
    word_bits,
)
from pretrain.evaluate.routing.tally import Tally
from pretrain.evaluate.routing.text import printable, routing_table, serves

ALL = (slice(None),)


def drawn_pairs(weights: list[float], tokens: int, coactivation: float = 0.0) -> np.ndarray:
    """Tokens that draw two different experts; a share of them always takes experts 0 and 1."""
    random = np.random.default_rng(0)
    counts, share = (
        np.zeros((len(weights), len(weights)), dtype=np.int64),
        np.array(weights) / sum(weights),
    )
    for _ in range(tokens):
        pair = (
            (0, 1)
            if random.random() < coactivation
            else random.choice(len(weights), 2, replace=False, p=share)
        )
        counts[pair[0], pair[1]] += 1
        counts[pair[1], pair[0]] += 1
    return counts


def test_experts_that_are_drawn_independently_have_a_lift_of_one() -> None:
    lift_EE = coactivation_lift(drawn_pairs([3, 1, 1, 1, 2, 1], 8000), ALL)
    off = ~np.eye(6, dtype=bool)
    assert np.isnan(np.diag(lift_EE)).all()
    assert np.abs(lift_EE[off] - 1).max() < 0.15


def test_expected_pairs_keep_how_often_each_expert_is_chosen() -> None:
    counts_EE = drawn_pairs([5, 1, 1, 2], 2000, coactivation=0.2)
    expected_EE = expected_coactivation(counts_EE + np.diag([7, 7, 7, 7]))
    np.testing.assert_allclose(expected_EE.sum(axis=1), counts_EE.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(expected_EE, expected_EE.T)
    assert (np.diag(expected_EE) == 0).all()
    # A product a_i a_j beside the diagonal: ratios of rows do not depend on the column.
    assert expected_EE[0, 2] * expected_EE[1, 3] == pytest.approx(
        expected_EE[0, 3] * expected_EE[1, 2]
    )


def test_no_tokens_and_no_pairs_expect_nothing() -> None:
    assert not expected_coactivation(np.zeros((4, 4), dtype=np.int64)).any()
    assert np.isnan(coactivation_lift(np.diag([5, 3, 0]), ALL)).all()
    assert coactivated_pairs(np.diag([5, 3, 0])) == []
    assert expected_coactivation(np.array([[9]])).tolist() == [[0]]


@pytest.mark.parametrize("others", [[1598, 277, 825], [2700], [5, 0, 1]])
def test_an_expert_that_every_token_chooses_leaves_the_others_no_chance_to_meet(
    others: list[int],
) -> None:
    counts_EE = np.zeros((len(others) + 1, len(others) + 1), dtype=np.int64)
    counts_EE[0, 1:] = counts_EE[1:, 0] = others
    np.testing.assert_allclose(expected_coactivation(counts_EE), counts_EE, atol=1e-3)
    lift_EE = coactivation_lift(counts_EE, ALL)
    assert np.isnan(lift_EE[1:, 1:]).all() and np.nanmax(np.abs(lift_EE - 1)) < 1e-3


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_expected_pairs_are_exact_however_uneven_the_experts_are(share: float) -> None:
    counts_EE = drawn_pairs([share, *[(1 - share) / 5] * 5], 3000)
    expected_EE = expected_coactivation(counts_EE)
    np.testing.assert_allclose(expected_EE.sum(axis=1), counts_EE.sum(axis=1), rtol=1e-6)
    assert expected_EE[0, 2] * expected_EE[1, 3] == pytest.approx(
        expected_EE[0, 3] * expected_EE[1, 2]
    )


def test_experts_of_different_pools_have_no_value_and_do_not_count() -> None:
    image_EE, text_EE = drawn_pairs([3, 1, 1], 4000), drawn_pairs([1, 1, 2], 1000)
    both_EE = np.block([[image_EE, np.zeros_like(image_EE)], [np.zeros_like(text_EE), text_EE]])
    lift_EE = coactivation_lift(both_EE, (slice(0, 3), slice(3, 6)))
    assert np.isnan(lift_EE[:3, 3:]).all() and np.isnan(lift_EE[3:, :3]).all()
    np.testing.assert_array_equal(lift_EE[:3, :3], coactivation_lift(image_EE, ALL))
    np.testing.assert_array_equal(lift_EE[3:, 3:], coactivation_lift(text_EE, ALL))
    (grid,) = coactivation_grids(both_EE[None], (1,), MoEConfig(num_experts=6, pools="modality"))
    np.testing.assert_array_equal(grid.ratio_RC, lift_EE)


def test_the_pair_that_keeps_together_is_named_first_and_chance_is_not() -> None:
    found = coactivated_pairs(drawn_pairs([1] * 6, 4000, coactivation=0.15))
    assert found[0]["experts"] == [0, 1]
    assert found[0]["lift"] > 1.5 and found[0]["tokens"] > found[0]["expected"]
    assert coactivated_pairs(drawn_pairs([1] * 6, 4000)) == []


def test_a_lean_compares_shares_and_not_counts() -> None:
    assert modality_lean(0.25, 0.25) == 0
    assert modality_lean(0.5, 0.0) == -1
    assert modality_lean(0.0, 0.1) == 1
    assert modality_lean(0.1, 0.3) == pytest.approx(0.5)
    assert modality_lean(0.0, 0.0) is None


def test_word_bits_are_the_divergence_and_chance_is_taken_off() -> None:
    base_W = np.array([5000, 5000, 5000, 5000])
    only_one = word_bits(np.array([4000, 0, 0, 0]), base_W)
    assert only_one == pytest.approx(2.0, abs=0.01)  # one of four words
    assert word_bits(np.array([1000, 1000, 1000, 1000]), base_W) == 0
    assert word_bits(np.zeros(4, dtype=np.int64), base_W) is None
    random = np.random.default_rng(1)
    by_chance = [
        word_bits(random.multinomial(400, np.ones(200) / 200), np.full(200, 1000))
        for _ in range(20)
    ]
    assert np.mean([value for value in by_chance if value is not None]) < 0.1  # 0.36 without


@pytest.mark.parametrize("tokens", [10, 60])
def test_few_tokens_among_many_words_are_neither_special_nor_nothing(tokens: int) -> None:
    base_W = np.full(900, 60)
    only_one = np.zeros(900, dtype=np.int64)
    only_one[5] = tokens
    bits = word_bits(only_one, base_W)
    assert bits is not None and 2 < bits < np.log2(900)
    random = np.random.default_rng(1)
    drawn = [
        word_bits(random.multivariate_hypergeometric(base_W, tokens), base_W) for _ in range(20)
    ]
    assert np.mean([value for value in drawn if value is not None]) < 0.05  # 6.5 or 3.9 without
    assert word_bits(base_W, base_W) == 0


def test_words_are_ranked_by_what_they_tell() -> None:
    base_W = np.array([100, 100, 10, 790])
    counts_W = np.array([50, 5, 10, 35])
    found = top_words(counts_W, base_W, ["cat", "dog", "rare", "the"], 5)
    assert [word["word"] for word in found] == ["cat", "rare"]
    assert found[0] == {"word": "cat", "count": 50, "lift": 5.0}
    assert found[1]["lift"] == 10.0
    hardly = top_words(np.array([110, 90]), np.array([1000, 1000]), ["so", "so-so"], 5)
    assert hardly == []  # 1.1 times as often
    assert top_words(np.array([2, 0, 0, 0]), base_W, ["cat", "dog", "rare", "the"], 5) == []


def test_the_number_of_experts_in_use() -> None:
    assert effective_number(np.array([7, 7, 7, 7])) == pytest.approx(4)
    assert effective_number(np.array([9, 0, 0])) == pytest.approx(1)


def specialists() -> Tally:
    """Two layers of four experts, two a token: experts 0 and 1 take the 40 patches, 2 and 3 the 20
    text tokens; in layer 1 all take all alike."""
    tally = Tally(2, 4)
    tally.pairs, tally.tokens_M = 4, np.array([40, 20])
    tally.visits_LME[0] = [[40, 40, 0, 0], [0, 0, 20, 20]]
    tally.visits_LME[1] = [[20, 20, 20, 20], [10, 10, 10, 10]]
    tally.weight_LME[:] = 0.5 * tally.visits_LME
    tally.entropy_LME[:] = 1.2 * tally.visits_LME
    tally.entropy_LM[:] = [1.2, 0.7] * tally.tokens_M
    tally.words_W = np.array([10, 10])
    tally.words_LEW = np.array(
        [[[0, 0], [0, 0], [10, 10], [10, 10]], [[10, 0], [10, 0], [0, 10], [0, 10]]]
    )
    return tally


def test_a_report_of_specialists_and_of_generalists() -> None:
    report = routing_report(specialists(), ["sky", "sea"], MoEConfig(num_experts=4), (1, 3))
    first, second = report["layers"]
    assert (first["block"], second["block"]) == (1, 3)
    assert [expert["lean"] for expert in first["experts"]] == [-1, -1, 1, 1]
    assert [expert["specialization"] for expert in second["experts"]] == [0, 0, 0, 0]
    assert first["experts"][0]["share"] == {"image": 1.0, "text": 0.0}
    assert first["experts"][2]["weight"] == pytest.approx(0.5)
    assert first["experts"][2]["entropy"] == pytest.approx(1.2)
    assert first["load"]["image"] == {
        "fair": 0.5,
        "max_over_mean": 2.0,
        "min_over_mean": 0.0,
        "used": pytest.approx(2),
        "entropy": pytest.approx(1.2),
    }
    assert second["load"]["text"]["max_over_mean"] == 1.0
    assert second["load"]["text"]["entropy"] == pytest.approx(0.7)
    assert [[word["word"] for word in expert["words"]] for expert in second["experts"]] == [
        ["sky"],
        ["sky"],
        ["sea"],
        ["sea"],
    ]
    assert first["experts"][0]["words"] == [] and first["experts"][0]["word_bits"] is None


def test_pools_are_judged_by_their_own_fair_share() -> None:
    moe = MoEConfig(num_experts=4, pools="modality")
    report = routing_report(specialists(), ["sky", "sea"], moe, (1, 3))
    load = report["layers"][0]["load"]
    assert load["image"]["fair"] == load["text"]["fair"] == 1.0
    assert "fair: image 100.0%, text 100.0%" in routing_table(report)
    assert load["image"]["max_over_mean"] == load["image"]["min_over_mean"] == 1.0
    image, text = load_grids(specialists().visits_LME, (1, 3), moe)
    assert np.isnan(image.ratio_RC[:, 2:]).all() and (image.ratio_RC[0, :2] == 1).all()
    assert np.isnan(text.ratio_RC[:, :2]).all() and (text.ratio_RC[0, 2:] == 1).all()


def test_the_table_says_whom_each_expert_serves() -> None:
    lines = routing_table(
        routing_report(specialists(), ["sky", "sea"], MoEConfig(num_experts=4), (1, 3))
    ).splitlines()
    assert lines[0] == "layer 01"
    assert (
        "image  busiest 2.00 x fair, idlest 0.00; like 2.0 even experts; entropy 1.20 nats"
        in lines[1]
    )
    row = next(line for line in lines if line.split()[:1] == ["2"])
    assert row.split() == ["2", "0.0%", "100.0%", "text", "1.00", "0.50", "1.20", "0.00"]
    assert any(line.endswith("sea x2.0") for line in lines)
    assert "fair: image 50.0%, text 50.0%" in lines[-2]


def test_words_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\u202e") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}"
    assert (serves(None), serves(0.01), serves(-0.06), serves(-0.5), serves(1.0)) == (
        "nobody",
        "both",
        "image 0.06",
        "image 0.50",
        "text 1.00",
    )


def test_fair_shares_of_nothing_are_unknown() -> None:
    assert np.isnan(over_fair_share(np.zeros((2, 3), dtype=np.int64), slice(0, 3))).all()


def test_colors_tell_less_from_more() -> None:
    assert (shade(1.0), shade(4.0), shade(0.25), shade(0.0), shade(math.inf)) == (
        FAIR,
        MORE,
        LESS,
        LESS,
        MORE,
    )
    assert shade(math.nan) == NOTHING
    assert shade(2.0) not in (FAIR, MORE) and shade(2.0)[0] > shade(2.0)[2]


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
def test_a_figure_shows_every_cell_at_any_size(experts: int) -> None:
    ratio_RC = np.full((3, experts), np.nan)
    ratio_RC[1, experts - 1] = 100.0
    grid = Grid("load", ratio_RC, ("a", "b", "c"), tuple(map(str, range(experts))))
    pixels = np.asarray(draw_grids([grid, grid]))
    side = cell_side(experts, 2)
    assert pixels.shape[1] <= max(SHEET, side * experts) + 200
    inside = (side - 1) ** 2
    red = (pixels == np.array(MORE)).all(axis=2).sum()
    assert 2 * inside * 0.5 <= red <= 2 * inside


def test_many_grids_stay_one_picture() -> None:
    grids = [Grid(f"layer {n}", np.ones((32, 32)), ("a",) * 32, ("b",) * 32) for n in range(11)]
    picture = draw_grids(grids)
    assert picture.width <= SHEET + 100 and picture.height <= SHEET


def test_two_grids_of_loads_are_not_small_because_many_others_are() -> None:
    loads, coactivation = np.full((2, 32), 100.0), np.ones((32, 32))
    grids = [Grid("load", loads, ("a", "b"), ("0",) * 32)] * 2 + [
        Grid("", coactivation, ("0",) * 32, ("0",) * 32)
    ] * 12
    red = (np.asarray(draw_grids(grids)) == np.array(MORE)).all(axis=2).sum()
    assert red == 2 * loads.size * (cell_side(32, 2) - 1) ** 2
    assert cell_side(32, 2) > 2 * cell_side(32, 12)


def test_the_last_label_is_not_cut_off() -> None:
    columns = 253  # so narrow that every fourth has a label, the last one too
    grid = Grid("", np.ones((2, columns)), ("a", "b"), tuple(map(str, range(columns))))
    pixels = np.asarray(draw_grids([grid]).convert("L"))
    inked = np.flatnonzero((pixels[: MARGIN + HEAD] < 200).any(axis=0))
    middle = MARGIN + LABEL + (columns - 0.5) * NARROWEST
    label = ImageFont.load_default(FONT_SIZE - 1).getlength("252")
    assert inked.max() == pytest.approx(middle + label / 2, abs=2)


def test_a_grid_for_each_layer_says_which_experts_go_together() -> None:
    counts_EE = drawn_pairs([1] * 6, 1000, coactivation=0.3)
    first, second = coactivation_grids(
        np.stack([counts_EE, np.zeros_like(counts_EE)]),
        (2, 5),
        MoEConfig(num_experts=6),
        ", text tokens",
    )
    assert first.title == "layer 02, text tokens: chosen together, over chance"
    assert first.ratio_RC[0, 1] > 1.2
    assert np.nanmax(first.ratio_RC[0, 2:]) < 1 < np.nanmin(first.ratio_RC[2, 3:])
    assert np.isnan(second.ratio_RC).all()
