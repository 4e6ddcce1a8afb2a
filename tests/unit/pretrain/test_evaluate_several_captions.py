"""Evaluation of images with several captions, from shards to results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.config.schema import EvalConfig, EvalSet
from pretrain.evaluate.command import eval_command, evaluate_sets, read_set
from pretrain.evaluate.evaluator import evaluation_mode
from pretrain.evaluate.report import format_examples
from pretrain.evaluate.trained_model import TrainedModel, load_model
from pretrain.parallel.communicator import LocalCommunicator
from pretrain.train.caption_samples import CaptionSampleLogger
from pretrain.train.components import TrainComponents
from tests.support.shape_dataset import CAPTIONS, ShapeDataset, render_shape_png
from tests.unit.pretrain.evaluate_support import RunFolder

KEYS = ("json:captions",)
COUNTS = (5, 1, 3, 2, 5, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes: ShapeDataset) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("run") / "run", shapes)


def captions_of(index: int) -> list[str]:
    """One to five captions, of which images have some in common, also in other case and spacing."""
    own = [CAPTIONS[(index + 7 * number) % 24] for number in range(COUNTS[index % len(COUNTS)])]
    return [text.capitalize().replace(" ", "  ") if index % 4 == 0 else text for text in own]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images as `vlmoe data write` stores them: the first caption in .txt, all in .json."""
    path = tmp_path_factory.mktemp("several") / "several"
    samples: list[dict[str, Any]] = []
    for index in range(30):
        captions = captions_of(index)
        samples.append(
            {
                "__key__": f"{index:03}",
                "png": render_shape_png(CAPTIONS[index], 24),
                "txt": captions[0],
                "json": {"captions": captions},
            }
        )
    write_shards(samples, path)
    return path


def load_with(folder: RunFolder, **settings: int) -> TrainedModel:
    """The model with other settings in `eval`."""
    trained = load_model(folder.path)
    return replace(trained, run=replace(trained.run, eval=replace(trained.run.eval, **settings)))


def canonical(text: str) -> str:
    return " ".join(text.split()).casefold()


def recall_by_loop(similarity: np.ndarray, matches: list[set[int]], k: int) -> float:
    hits = 0
    for row, own in zip(similarity, matches, strict=True):
        hits += any(int(candidate) in own for candidate in np.argsort(-row)[:k])
    return 100 * hits / len(matches)


@pytest.mark.parametrize("batch_size", [7, 128])
def test_all_captions_of_an_image_count(folder: RunFolder, shards: Path, batch_size: int) -> None:
    trained = load_with(folder, batch_size=batch_size)
    eval_set = EvalSet(name="several", shards=str(shards), caption_keys=KEYS)
    result = evaluate_sets(trained, [eval_set])["several"]

    captions = [list(dict.fromkeys(map(canonical, captions_of(index)))) for index in range(30)]
    first_form = {
        canonical(text): text for i in reversed(range(30)) for text in captions_of(i)[::-1]
    }
    texts = list(first_form)
    images = [render_shape_png(CAPTIONS[index], 24) for index in range(30)]
    with evaluation_mode(trained.model):
        similarity = (
            trained.embed_images(images) @ trained.embed_texts(list(first_form.values())).T
        ).numpy()
    texts_of_image = [{texts.index(text) for text in own} for own in captions]
    images_of_text = [{i for i, own in enumerate(captions) if text in own} for text in texts]
    assert (result["images"], result["texts"]) == (30, len(texts))
    for k in (1, 5, 10):
        to_text = recall_by_loop(similarity, texts_of_image, k)
        to_image = recall_by_loop(similarity.T, images_of_text, k)
        assert result["image_to_text"][f"R@{k}"] == pytest.approx(to_text)
        assert result["text_to_image"][f"R@{k}"] == pytest.approx(to_image)


def test_generated_captions_are_compared_with_all_captions(
    folder: RunFolder, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last caption of every image is generated."""
    trained = load_with(folder, caption_samples=30)
    order = iter(range(30))

    def generate(*_: object, **__: object) -> list[list[int]]:
        last = [captions_of(index)[-1] for index in range(30)]
        return [trained.tokenizer.encode(last[next(order)], 64)[1:-1] for _ in range(30)]

    monkeypatch.setattr("pretrain.evaluate.generated_captions.generate_captions", generate)
    eval_set = EvalSet(name="several", shards=str(shards), caption_keys=KEYS)
    result = evaluate_sets(trained, [eval_set])["several"]
    assert result["caption_exact"] == 100
    assert result["examples"][0]["references"] == [" ".join(t.split()) for t in captions_of(0)]
    assert format_examples(result).count("  = ") == len(result["examples"])


def test_caption_keys_select_the_captions(
    folder: RunFolder, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = eval_command(folder.path, [str(shards)], None, None)["several"]
    assert first["texts"] == len({canonical(captions_of(index)[0]) for index in range(30)})
    given = eval_command(folder.path, [str(shards)], None, None, caption_keys=KEYS)["several"]
    assert given["texts"] == len({canonical(t) for i in range(30) for t in captions_of(i)})
    assert f"{given['texts']} texts" in capsys.readouterr().out


def test_batches_have_all_captions_only_in_evaluation(folder: RunFolder, shards: Path) -> None:
    trained = load_model(folder.path)
    data = EvalSet(name="x", shards=str(shards), caption_keys=KEYS).data(trained.run.data)
    (first, *_) = read_set(trained, load_manifest(str(shards)), data)
    assert [texts[0] for texts in first.all_captions] == list(first.captions)
    assert [len(texts) for texts in first.all_captions] == [
        COUNTS[index % len(COUNTS)] for index in range(len(first.keys))
    ]


def test_images_for_captions_during_training_are_read_with_the_keys_of_their_set(
    folder: RunFolder, shards: Path
) -> None:
    trained = load_model(folder.path)
    sets = (EvalSet(name="x", shards=str(shards), caption_keys=("json:captions",)),)
    run = replace(trained.run, eval=EvalConfig(sets=sets))
    components: dict[str, Any] = {
        "run": run,
        "engine": SimpleNamespace(communicator=LocalCommunicator(trained.device)),
        "out": folder.path,
        "tokenizer": trained.tokenizer,
        "data": replace(run.data, caption_keys=("json:missing",)),
    }
    logger = CaptionSampleLogger.open(cast(TrainComponents, SimpleNamespace(**components)))
    assert logger is not None
    assert logger.batch.captions[1] == captions_of(1)[0]
