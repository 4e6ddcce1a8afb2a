"""`vlmoe eval` and `vlmoe caption`: a run folder in, a table or captions out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.storage import read_bytes
from data_pipeline.content.captions import clean
from data_pipeline.content.images import decode
from data_pipeline.content.transforms import eval_transform
from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.shards.manifest import Manifest, load_manifest
from pretrain.config.schema import EvalSet
from pretrain.evaluate.judge import (
    Picture,
    choose_samples,
    evaluate_captions,
    evaluate_set,
    judging,
    write_for,
)
from pretrain.evaluate.report import format_examples, format_table, write_json
from pretrain.evaluate.trained import Trained, load_trained

logger = logging.getLogger(__name__)

SMALL_SET = 20_000
"""Pairs up to which a set is read without worker processes."""


def eval_command(
    run_dir: Path, shards: Sequence[str] | None, labels: str | None, json_path: Path | None
) -> dict[str, dict[str, Any]]:
    """Judge a run on its held-out sets, or on others, and print a table.

    Args:
        run_dir: The run's folder.
        shards: Manifests, or folders that hold one, instead of the run's sets.
        labels: With `shards`: a file with one caption a line to rank against.
        json_path: Where to write the results too.

    Returns:
        Results by name of the set; see `judge.evaluate_set`.
    """
    trained = load_trained(run_dir)
    sets = named_sets(shards, labels or "") if shards else trained.run.eval.sets
    if not sets:
        raise ConfigError(f"eval.sets of {run_dir}/config.yaml is empty; name shards with --shards")
    results = evaluate_sets(trained, sets)
    print(f"{run_dir}, step {trained.step:,} (percent)\n\n{format_table(results)}")
    for name, result in results.items():
        print(f"\n{name}, captions (= exactly right):\n{format_examples(result)}")
    if json_path is not None:
        write_json(json_path, results)
        logger.info("wrote %s", json_path)
    return results


def evaluate_sets(trained: Trained, sets: Sequence[EvalSet]) -> dict[str, dict[str, Any]]:
    """Judge a model on several sets; results by name of the set."""
    results = {}
    for one in sets:
        manifest = load_manifest(one.shards)
        logger.info("judging %s: %d pairs", one.name, manifest.total_samples)
        with judging(trained.model):
            results[one.name] = evaluate_set(
                trained.model,
                open_set(trained, manifest),
                tokenizer=trained.tokenizer,
                name=one.name,
                total=manifest.total_samples,
                labels=read_labels(one.labels) if one.labels else (),
                context_length=trained.run.model.context_length,
                caption_samples=trained.run.eval.caption_samples,
                device=trained.device,
                texts_per_forward=trained.run.eval.batch_size,
            )
    return results


def evaluate_written(trained: Trained, shards: str, *, name: str) -> dict[str, Any]:
    """Only written captions, on `eval.caption_samples` pictures of a set, the training set for
    example."""
    manifest = load_manifest(shards)
    indices = choose_samples(name, manifest.total_samples, trained.run.eval.caption_samples)
    with judging(trained.model):
        return evaluate_captions(
            trained.model,
            open_set(trained, manifest, indices),
            tokenizer=trained.tokenizer,
            context_length=trained.run.model.context_length,
            device=trained.device,
        )


def caption_command(run_dir: Path, images: Sequence[Path]) -> None:
    """Write a caption for each picture and print them, one `PATH: caption` a line.

    Raises:
        DataError: Some files are no pictures; the others have got their captions.
    """
    trained = load_trained(run_dir)
    pictures, problems = [], []
    for path in images:
        try:
            image = eval_transform(decode(path.read_bytes()), trained.run.model.image_size)
        except DataError as error:
            problems.append(f"{path}: {error}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
        else:
            pictures.append(Picture(str(path), "", torch.as_tensor(image)))
    with judging(trained.model):
        writing = write_for(
            trained.model,
            pictures,
            tokenizer=trained.tokenizer,
            context_length=trained.run.model.context_length,
            device=trained.device,
        )
    for key, written in zip(writing.keys, writing.written, strict=True):
        print(f"{key}: {written}")
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} of {len(images)} pictures could not be read:\n  {listed}")


def open_set(
    trained: Trained, manifest: Manifest, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every pair of a set once, or those at `indices`, as the run's model reads them."""
    run = trained.run
    num_pairs = manifest.total_samples if indices is None else len(indices)
    return read_all(
        manifest,
        tokenizer=trained.tokenizer,
        data=replace(run.data, cache_dir=run.data.cache_dir or str(trained.run_dir / "cache")),
        image_size=run.model.image_size,
        context_length=run.model.context_length,
        micro_batch_size=run.eval.batch_size,
        indices=indices,
        # Reading a small set here is quicker than starting processes for it.
        workers=run.data.workers if num_pairs > SMALL_SET else 0,
    )


def named_sets(shards: Sequence[str], labels: str = "") -> tuple[EvalSet, ...]:
    """Sets for manifests or folders, each called after its folder; after its address where two are
    alike."""
    folders = [address.removesuffix("/manifest.json").rstrip("/") for address in shards]
    names = [folder.rpartition("/")[2] or folder for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    return tuple(
        EvalSet(name=name, shards=address, labels=labels)
        for name, address in zip(names, shards, strict=True)
    )


def read_labels(address: str) -> tuple[str, ...]:
    """Captions of a labels file, one a line; empty lines are left out.

    Raises:
        DataError: It cannot be read, is not UTF-8, or holds no caption.
    """
    try:
        lines = read_bytes(address).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"labels file {address} is not UTF-8: {error}") from error
    labels = tuple(caption for line in lines if (caption := clean(line)))
    if not labels:
        raise DataError(f"labels file {address} holds no caption; write one a line")
    return labels
