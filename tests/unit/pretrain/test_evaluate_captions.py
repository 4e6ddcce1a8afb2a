"""Caption generation with a scripted model, and caption metrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.evaluate.captions import exact_match_percent, same_caption, token_accuracy_percent
from pretrain.evaluate.generation import generate_captions
from pretrain.evaluate.report import format_examples

START, END, VOCABULARY = 1, 2, 40


class ScriptedModel:
    """Predicts a fixed caption for each image, selected by the image's first pixel."""

    def __init__(self, captions: list[list[int]]) -> None:
        self.captions = captions
        self.batch_sizes: list[int] = []

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        self.batch_sizes.append(images.shape[0])
        logits = torch.zeros(images.shape[0], VOCABULARY)
        for row, length in enumerate(text_lengths.tolist()):
            caption = self.captions[int(images[row, 0, 0, 0])]
            assert text_ids[row, :length].tolist() == [START, *caption[: length - 1]]
            logits[row, caption[length - 1] if length - 1 < len(caption) else END] = 1
        return logits


def make_images(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2)


def generate(model: ScriptedModel, images: Tensor, max_length: int) -> list[list[int]]:
    return generate_captions(model, images, start_id=START, end_id=END, max_length=max_length)


def test_each_image_gets_its_caption() -> None:
    captions = [[5, 6, 7], [], [8], [9, 9, 9, 9, 9], [10, 11]]
    model = ScriptedModel(captions)
    assert generate(model, make_images(5), max_length=16) == captions


def test_finished_images_leave_the_batch() -> None:
    model = ScriptedModel([[5, 6, 7], [], [8], [9, 9, 9, 9, 9], [10, 11]])
    generate(model, make_images(5), max_length=16)
    assert model.batch_sizes == [5, 4, 3, 2, 1, 1]


def test_captions_do_not_depend_on_the_batch() -> None:
    model, images = ScriptedModel([[5, 6, 7], [], [8], [9] * 20]), make_images(4)
    batched = generate(model, images, max_length=10)
    assert batched == [generate(model, images[i : i + 1], max_length=10)[0] for i in range(4)]


@pytest.mark.parametrize("max_length", [2, 3, 5, 6])
def test_long_captions_are_truncated(max_length: int) -> None:
    model = ScriptedModel([[9] * 99])
    assert generate(model, make_images(1), max_length=max_length) == [[9] * (max_length - 2)]


def test_a_caption_of_the_maximum_length_is_complete() -> None:
    assert generate(ScriptedModel([[5, 6, 7]]), make_images(1), max_length=5) == [[5, 6, 7]]


def test_no_images_give_no_captions() -> None:
    assert generate(ScriptedModel([]), make_images(0), max_length=8) == []


def test_exact_match_ignores_whitespace_only() -> None:
    assert same_caption("a  red fox ", "a red fox")
    assert not same_caption("a Red fox", "a red fox")
    assert exact_match_percent(["a", "b", "c", " d"], [["a"], ["x"], ["y"], ["e", "d"]]) == 50.0
    assert exact_match_percent([], []) == 0.0


def test_token_accuracy_is_over_all_tokens() -> None:
    # The mean of the batches' accuracies would be 75 %.
    assert token_accuracy_percent([(1, 1), (4, 8)]) == pytest.approx(100 * 5 / 9)
    assert token_accuracy_percent([]) == 0.0


def test_captions_are_escaped_for_the_terminal() -> None:
    generated = ["\x1b[2J", "\x1b]0;a"]
    examples = [{"generated": text, "references": ["\x1b]0;a"]} for text in generated]
    text = format_examples({"examples": examples})
    assert "\x1b" not in text and text.count(r"\x1b") == 3
