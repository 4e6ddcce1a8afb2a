"""Evaluation of a run folder with a real model, shards and checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.common.config import dump_yaml
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import TokenizerError
from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.checkpoint import CheckpointError
from pretrain.config.schema import EvalSet
from pretrain.evaluate.command import (
    eval_command,
    evaluate_caption_samples,
    evaluate_sets,
    make_evaluator,
    read_set,
)
from pretrain.evaluate.embed import embed_texts
from pretrain.evaluate.evaluator import SetOptions, evaluation_mode, sample_indices
from pretrain.evaluate.trained_model import load_model
from tests.support.shape_dataset import CAPTIONS, ShapeDataset, render_shape_png
from tests.unit.pretrain.evaluate_support import RunFolder


@pytest.fixture
def folder(tmp_path: Path, shapes: ShapeDataset) -> RunFolder:
    return RunFolder(tmp_path / "run", shapes)


def test_the_loaded_model_equals_the_saved_one(folder: RunFolder) -> None:
    trained = load_model(folder.path)
    assert trained.step == 12
    assert not trained.model.training
    expected = folder.model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_eval_prints_a_table_and_writes_json(
    folder: RunFolder, shapes: ShapeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder.path / "eval.json"
    results = eval_command(folder.path, shards=None, labels=None, json_path=path)
    assert json.loads(path.read_text()) == results

    result = results["held"]
    assert (result["images"], result["texts"]) == (64, len(set(shapes.captions)))
    assert result["caption_samples"] == 9
    assert result["chance"]["R@1"] == pytest.approx(100 / result["texts"])
    assert result["corrupt_samples"] == 0
    for direction in ("image_to_text", "text_to_image"):
        assert list(result[direction]) == ["R@1", "R@5", "R@10"]
        r1, r5, r10 = result[direction].values()
        assert 0 <= r1 <= r5 <= r10 <= 100

    printed, progress = capsys.readouterr()
    assert "held: 64 images" in printed
    assert f"{result['image_to_text']['R@10']:.2f}" in printed
    for count in ("64/64 pairs", f"{result['texts']}/{result['texts']} texts", "9/9 generated"):
        assert f"held: {count}" in progress


def test_token_accuracy_equals_predicting_tokens_one_by_one(
    folder: RunFolder, shapes: ShapeDataset
) -> None:
    trained = load_model(folder.path)
    batch = next(iter(read_set(trained, load_manifest(shapes.folder), trained.run.data, [3, 5, 8])))
    options = SetOptions(name="three", num_pairs=3)
    result = make_evaluator(trained).evaluate_set([batch], options)

    correct = total = 0
    for row, length in enumerate(batch.text_lengths.tolist()):
        for position in range(1, length):
            logits = trained.model.next_token_logits(
                batch.images[row : row + 1],
                batch.text_ids[row : row + 1, :position],
                torch.tensor([position]),
            )
            correct += int(logits.argmax() == batch.text_ids[row, position])
            total += 1
    assert result["caption_token_accuracy"] == pytest.approx(100 * correct / total)


def test_text_embeddings_do_not_depend_on_the_batch(
    folder: RunFolder, shapes: ShapeDataset
) -> None:
    trained = load_model(folder.path)

    def embed(texts_per_forward: int) -> Tensor:
        with evaluation_mode(trained.model):
            return embed_texts(
                trained.model,
                trained.tokenizer,
                [*shapes.captions[:7], "a"],
                context_length=16,
                texts_per_forward=texts_per_forward,
                device=trained.device,
            )

    torch.testing.assert_close(embed(3), embed(8))
    torch.testing.assert_close(embed(1), embed(8))


def test_caption_samples_equal_those_of_the_full_evaluation(
    folder: RunFolder, shapes: ShapeDataset
) -> None:
    trained = load_model(folder.path)
    samples = evaluate_caption_samples(trained, trained.run.eval.sets[0])
    full = evaluate_sets(trained, trained.run.eval.sets)["held"]
    assert samples["examples"] == full["examples"]
    assert samples["caption_samples"] == 9
    keys = [shapes.keys[index] for index in sample_indices("held", 64, 9)]
    assert [example["key"] for example in samples["examples"]] == keys


def test_corrupt_samples_are_counted(folder: RunFolder, tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [
        {"__key__": str(index), "png": render_shape_png(caption, 24), "txt": caption}
        for index, caption in enumerate(CAPTIONS[:4])
    ]
    samples[1]["png"] = b"not an image"
    write_shards(samples, tmp_path / "mixed")
    shards = str(tmp_path / "mixed")

    result = eval_command(folder.path, [shards], labels=None, json_path=None)["mixed"]
    assert (result["images"], result["corrupt_samples"]) == (3, 1)
    captions = evaluate_caption_samples(
        load_model(folder.path), EvalSet(name="mixed", shards=shards)
    )
    assert (captions["caption_samples"], captions["corrupt_samples"]) == (3, 1)


def test_labels_replace_the_captions_as_candidates(
    folder: RunFolder, shapes: ShapeDataset, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    captions = sorted(set(shapes.captions))
    duplicate = captions[0].upper()
    labels.write_text("\n".join([*captions, "", "  a caption of  nothing ", duplicate]))
    results = eval_command(folder.path, [str(shapes.folder)], str(labels), json_path=None)
    assert results[shapes.folder.name]["texts"] == len(captions) + 1


def test_a_caption_that_is_not_among_the_labels_is_an_error(
    folder: RunFolder, shapes: ShapeDataset, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a caption of nothing\n")
    with pytest.raises(DataError, match="1 label "):
        eval_command(folder.path, [str(shapes.folder)], str(labels), json_path=None)


def replace_tokenizer(folder: RunFolder) -> None:
    words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    train_tokenizer(words * 3, folder.path / "tokenizer.model", vocab_size=280)


def change_model_config(folder: RunFolder) -> None:
    run = replace(folder.run, moe=replace(folder.run.moe, expert_width=24))
    (folder.path / "config.yaml").write_text(dump_yaml(run))


def remove_checkpoints(folder: RunFolder) -> None:
    shutil.rmtree(folder.path / "checkpoints")


def remove_config(folder: RunFolder) -> None:
    (folder.path / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (replace_tokenizer, TokenizerError, "fingerprint"),
        (change_model_config, CheckpointError, "config.yaml"),
        (remove_checkpoints, CheckpointError, "no checkpoint"),
        (remove_config, ConfigError, "config.yaml"),
    ],
)
def test_an_invalid_run_folder_is_an_error(
    folder: RunFolder, change: Callable[[RunFolder], None], error: type[Exception], message: str
) -> None:
    change(folder)
    with pytest.raises(error, match=message):
        load_model(folder.path)
