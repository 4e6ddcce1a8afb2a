"""From a run folder to a table: a real model, real shards, a real checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.common.config import apply_overrides, dump_yaml, from_mapping
from data_pipeline.common.errors import CheckpointError, ConfigError, DataError, TokenizerError
from data_pipeline.content.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.checkpoint import save
from pretrain.config.schema import EvalSet, RunConfig
from pretrain.evaluate.command import (
    caption_command,
    eval_command,
    evaluate_sets,
    evaluate_written,
    named_sets,
    open_set,
    read_labels,
)
from pretrain.evaluate.embed import embed_texts
from pretrain.evaluate.judge import choose_samples, distinct_texts, evaluate_set, judging
from pretrain.evaluate.trained import load_trained
from pretrain.model import VisionLanguageModel, build_model
from pretrain.parallel.layout import Layout
from tests.support.shards import CAPTIONS, Shapes, picture

SMALL = [
    "model.width=32",
    "model.num_layers=3",
    "model.num_heads=2",
    "model.pool_heads=2",
    "model.ffn_width=48",
    "model.fusion_layer=1",
    "model.patch_size=16",
    "model.context_length=16",
    "model.embed_dim=24",
    "moe.num_experts=4",
    "moe.expert_width=16",
    "eval.batch_size=24",
    "eval.caption_samples=9",
    "data.workers=0",
]


@dataclass
class RankOfTwo:
    """Saves what the two ranks of an expert-parallel run save, but from one process."""

    model: VisionLanguageModel
    rank: int = 0
    world_size: int = 1

    @property
    def layout(self) -> Layout:
        return Layout(
            world_size=2, expert_parallel_size=2, zero_stage=1, precision="fp32", num_experts=4
        )

    def model_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if ".experts." in name:
                tensors |= {
                    f"{name}@{first}:{first + 2}": tensor[first : first + 2] for first in (0, 2)
                }
            else:
                tensors[name] = tensor
        return tensors

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_model_tensors(self, tensors: Any) -> None:
        raise NotImplementedError

    def load_optimizer_tensors(self, tensors: Any) -> None:
        raise NotImplementedError

    def gather_json(self, value: Any) -> list[Any]:
        return [value]


class RunFolder:
    """A run folder as training leaves it."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.path = path
        overrides = [
            *SMALL,
            *shapes.overrides,
            f"eval.sets=[{{name: held, shards: {shapes.folder}}}]",
        ]
        self.run = from_mapping(RunConfig, apply_overrides({}, overrides))
        self.model = build_model(self.run)
        torch.manual_seed(0)
        with torch.no_grad():  # far from its first values, so that captions differ
            for parameter in self.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.tokenizer = Tokenizer.load(shapes.tokenizer)
        path.mkdir()
        (path / "config.yaml").write_text(dump_yaml(self.run))
        (path / "tokenizer.model").write_bytes(self.tokenizer.model_bytes)
        save(
            RankOfTwo(self.model),
            root=path / "checkpoints",
            step=12,
            state_json={"tokenizer": self.tokenizer.fingerprint},
            rank_state={},
        )


@pytest.fixture()
def folder(tmp_path: Path, shapes: Shapes) -> RunFolder:
    return RunFolder(tmp_path / "run", shapes)


def test_the_loaded_model_is_the_saved_one(folder: RunFolder) -> None:
    trained = load_trained(folder.path)
    assert trained.step == 12
    assert not trained.model.training
    expected = folder.model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_table_is_printed_and_json_written(
    folder: RunFolder, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder.path / "eval.json"
    results = eval_command(folder.path, None, None, target)
    assert json.loads(target.read_text()) == results
    held = results["held"]
    assert (held["images"], held["texts"]) == (64, len(set(shapes.captions)))
    assert held["caption_samples"] == 9
    assert held["chance"]["R@1"] == pytest.approx(100 / held["texts"])
    assert held["bad_samples"] == 0
    for part in ("image_to_text", "text_to_image"):
        assert list(held[part]) == ["R@1", "R@5", "R@10"]
        assert 0 <= held[part]["R@1"] <= held[part]["R@5"] <= held[part]["R@10"] <= 100
    printed = capsys.readouterr().out
    assert "held: 64 images" in printed
    assert f"{held['image_to_text']['R@10']:.2f}" in printed


def test_token_accuracy_matches_the_model_one_by_one(folder: RunFolder, shapes: Shapes) -> None:
    trained = load_trained(folder.path)
    batch = next(iter(open_set(trained, load_manifest(shapes.folder), [3, 5, 8])))
    result = evaluate_set(
        trained.model,
        [batch],
        tokenizer=trained.tokenizer,
        name="three",
        total=3,
        context_length=16,
        caption_samples=0,
        device=trained.device,
    )
    hits = tokens = 0
    for row, length in enumerate(batch.text_lengths.tolist()):
        for known in range(1, length):
            logits = trained.model.next_token_logits(
                batch.images[row : row + 1],
                batch.text_ids[row : row + 1, :known],
                torch.tensor([known]),
            )
            hits, tokens = hits + int(logits.argmax() == batch.text_ids[row, known]), tokens + 1
    assert result["caption_token_accuracy"] == pytest.approx(100 * hits / tokens)


def test_texts_are_embedded_alike_in_any_batch(folder: RunFolder, shapes: Shapes) -> None:
    trained = load_trained(folder.path)

    def embed(texts_per_forward: int) -> Tensor:
        with judging(trained.model):
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


def test_written_captions_are_those_of_the_whole_set(folder: RunFolder, shapes: Shapes) -> None:
    trained = load_trained(folder.path)
    written = evaluate_written(trained, str(shapes.folder), name="held")
    whole = evaluate_sets(trained, trained.run.eval.sets)["held"]
    assert written["examples"] == whole["examples"]
    assert written["caption_samples"] == 9
    keys = [shapes.keys[index] for index in choose_samples("held", 64, 9)]
    assert [example["key"] for example in written["examples"]] == keys


def test_bad_samples_are_counted(folder: RunFolder, tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [
        {"__key__": str(number), "png": picture(CAPTIONS[number], 24), "txt": CAPTIONS[number]}
        for number in range(4)
    ]
    samples[1]["png"] = b"this is no picture"
    write_shards(samples, tmp_path / "mixed")
    judged = eval_command(folder.path, [str(tmp_path / "mixed")], None, None)["mixed"]
    written = evaluate_written(load_trained(folder.path), str(tmp_path / "mixed"), name="mixed")
    assert (judged["images"], judged["bad_samples"]) == (3, 1)
    assert (written["caption_samples"], written["bad_samples"]) == (3, 1)


def test_labels_are_what_is_ranked_against(
    folder: RunFolder, shapes: Shapes, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    captions = sorted(set(shapes.captions))
    labels.write_text("\n".join([*captions, "", "  a caption of  nothing ", captions[0].upper()]))
    results = eval_command(folder.path, [str(shapes.folder)], str(labels), None)
    assert results[shapes.folder.name]["texts"] == len(captions) + 1


def test_a_caption_that_is_no_label_is_an_error(
    folder: RunFolder, shapes: Shapes, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a caption of nothing\n")
    with pytest.raises(DataError, match="not among its 1 labels"):
        eval_command(folder.path, [str(shapes.folder)], str(labels), None)


def test_captions_for_a_persons_own_pictures(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        tmp_path / "red.png",
        tmp_path / "text.jpg",
        tmp_path / "blue.webp",
        tmp_path / "missing.png",
    ]
    Image.new("RGB", (90, 60), "red").save(paths[0])
    paths[1].write_text("I am no picture")
    Image.new("RGB", (60, 90), "blue").save(paths[2])
    with pytest.raises(DataError, match="2 of 4 pictures could not be read") as raised:
        caption_command(folder.path, paths)
    assert str(paths[1]) in str(raised.value)
    assert str(paths[3]) in str(raised.value)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(paths[0]), str(paths[2])]


def other_tokenizer(folder: RunFolder) -> None:
    words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    train_tokenizer(words * 3, folder.path / "tokenizer.model", vocab_size=280)


def other_model(folder: RunFolder) -> None:
    run = replace(folder.run, moe=replace(folder.run.moe, expert_width=24))
    (folder.path / "config.yaml").write_text(dump_yaml(run))


def no_checkpoint(folder: RunFolder) -> None:
    (folder.path / "checkpoints").rename(folder.path / "elsewhere")


def no_config(folder: RunFolder) -> None:
    (folder.path / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (other_tokenizer, TokenizerError, "put back the tokenizer of this run"),
        (other_model, CheckpointError, "of another model than the run's config.yaml"),
        (no_checkpoint, CheckpointError, "has no checkpoint yet"),
        (no_config, ConfigError, "not the folder of a run"),
    ],
)
def test_a_wrong_run_folder_is_refused(
    folder: RunFolder, spoil: Callable[[RunFolder], None], kind: type[Exception], message: str
) -> None:
    spoil(folder)
    with pytest.raises(kind, match=message):
        load_trained(folder.path)


def test_distinct_texts_differ_by_more_than_capitals() -> None:
    assert distinct_texts(["a fox", "A  fox", "b"], []) == (["a fox", "b"], [0, 0, 1])
    assert distinct_texts(["b"], ["a", "B", "b"]) == (["a", "B"], [1])


def test_chosen_samples_are_always_the_same() -> None:
    chosen = choose_samples("train", 1000, 200)
    assert chosen == choose_samples("train", 1000, 200)
    assert len(set(chosen)) == 200
    assert 0 <= min(chosen) < 100 and 900 < max(chosen) < 1000
    assert choose_samples("tiny", 3, 200) == (0, 1, 2)


def test_judging_leaves_the_model_as_it_was() -> None:
    model = torch.nn.Linear(2, 2)
    with judging(model):
        assert not model.training
        assert not model(torch.ones(1, 2)).requires_grad
    assert model.training


def test_sets_are_called_after_their_folders() -> None:
    assert named_sets(["data/a/manifest.json", "s3://bucket/b/"]) == (
        EvalSet(name="a", shards="data/a/manifest.json"),
        EvalSet(name="b", shards="s3://bucket/b/"),
    )
    assert [one.name for one in named_sets(["x/a", "y/a"], "labels")] == ["x/a", "y/a"]


def test_empty_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds no caption"):
        read_labels(str(tmp_path / "labels.txt"))
