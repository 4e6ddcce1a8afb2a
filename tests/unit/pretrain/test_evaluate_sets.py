"""Evaluation sets: names, sampled images, candidate texts."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from pretrain.config.schema import EvalSet
from pretrain.evaluate.command import named_sets
from pretrain.evaluate.evaluator import distinct_texts, evaluation_mode, sample_indices


def test_distinct_texts_ignore_case_and_whitespace() -> None:
    captions = [["a fox", "B"], ["A  fox", "c", "a FOX"], ["b"]]
    pairs = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)]
    assert distinct_texts(captions, []) == (["a fox", "B", "c"], pairs)
    assert distinct_texts([["b"]], ["a", "B", "b"]) == (["a", "B"], [(0, 1)])


def test_one_caption_of_an_image_must_be_a_label() -> None:
    captions = [["an image of a fox", "fox"], ["owl", "a bird"]]
    texts, pairs = distinct_texts(captions, ["cat", "owl", "fox"])
    assert (texts, pairs) == (["cat", "owl", "fox"], [(0, 2), (1, 1)])
    captions.append(["owl", "a bird"])
    with pytest.raises(DataError, match=r"2 labels of 'mine' include no .* of 2 images .*'owl'"):
        distinct_texts(captions, ["cat", "fox"], name="mine")


def test_sample_indices_are_deterministic() -> None:
    indices = sample_indices("train", 1000, 200)
    assert indices == sample_indices("train", 1000, 200)
    assert len(set(indices)) == 200
    assert 0 <= min(indices) < 100 and 900 < max(indices) < 1000
    assert sample_indices("tiny", 3, 200) == (0, 1, 2)


def test_evaluation_mode_restores_training_mode() -> None:
    model = torch.nn.Linear(2, 2)
    with evaluation_mode(model):
        assert not model.training
        assert not model(torch.ones(1, 2)).requires_grad
    assert model.training


def test_sets_are_named_after_their_folders() -> None:
    assert named_sets(["data/a/manifest.json", "s3://bucket/b/"]) == (
        EvalSet(name="a", shards="data/a/manifest.json"),
        EvalSet(name="b", shards="s3://bucket/b/"),
    )
    with pytest.raises(ConfigError, match=r"--shards: a and a/manifest.json are the same shards"):
        named_sets(["a", "b", "a/manifest.json"])
    sets = named_sets(["x/a", "y/a"], "labels", ["json:captions"])
    assert [eval_set.name for eval_set in sets] == ["x-a", "y-a"]
    assert {eval_set.caption_keys for eval_set in sets} == {("json:captions",)}
    with pytest.raises(ConfigError, match="--caption-key contains 'captions'"):
        named_sets(["x"], caption_keys=["captions"])
