"""Writing captions with models whose answers are known, and counting them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.evaluate.captions import exact_percent, same_caption, token_percent
from pretrain.evaluate.generation import write_captions

START, END, VOCABULARY = 1, 2, 40


class Reciter:
    """Knows one sentence for each picture, by its first pixel, and says it word by word."""

    def __init__(self, sentences: list[list[int]]) -> None:
        self.sentences = sentences
        self.rows_seen: list[int] = []

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        self.rows_seen.append(images.shape[0])
        logits = torch.zeros(images.shape[0], VOCABULARY)
        for row, length in enumerate(text_lengths.tolist()):
            sentence = self.sentences[int(images[row, 0, 0, 0])]
            assert text_ids[row, :length].tolist() == [START, *sentence[: length - 1]]
            logits[row, sentence[length - 1] if length - 1 < len(sentence) else END] = 1
        return logits


def pictures(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)


def write(model: Reciter, images: Tensor, max_length: int) -> list[list[int]]:
    return write_captions(model, images, start_id=START, end_id=END, max_length=max_length)


def test_each_picture_gets_its_own_sentence() -> None:
    sentences = [[5, 6, 7], [], [8], [9, 9, 9, 9, 9], [10, 11]]
    model = Reciter(sentences)
    assert write(model, pictures(5), max_length=16) == sentences
    # Finished pictures leave: one goes after each step here.
    assert model.rows_seen == [5, 4, 3, 2, 1, 1]


def test_batch_mates_change_nothing() -> None:
    model = Reciter([[5, 6, 7], [], [8], [9] * 20])
    coactivation = write(model, pictures(4), max_length=10)
    assert coactivation == [
        write(model, pictures(4)[i : i + 1], max_length=10)[0] for i in range(4)
    ]


@pytest.mark.parametrize("max_length", [2, 3, 5, 6])
def test_endless_talk_is_cut(max_length: int) -> None:
    assert write(Reciter([[9] * 99]), pictures(1), max_length=max_length) == [
        [9] * (max_length - 2)
    ]


def test_a_sentence_that_just_fits_is_whole() -> None:
    assert write(Reciter([[5, 6, 7]]), pictures(1), max_length=5) == [[5, 6, 7]]


def test_no_pictures_no_captions() -> None:
    assert write(Reciter([]), pictures(0), max_length=8) == []


def test_exact_match_looks_past_blanks_only() -> None:
    assert same_caption("a  red fox ", "a red fox")
    assert not same_caption("a Red fox", "a red fox")
    assert exact_percent(["a", "b", "c", " d"], ["a", "x", "y", "d"]) == 50.0
    assert exact_percent([], []) == 0.0


def test_token_share_is_of_all_tokens() -> None:
    # A mean of the batches' shares would be 75 %.
    assert token_percent([(1, 1), (4, 8)]) == pytest.approx(100 * 5 / 9)
    assert token_percent([]) == 0.0
