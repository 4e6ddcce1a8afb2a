"""`vlmoe eval`: evaluates a run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.common.addresses import userinfo_problems, without_secrets
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.json_file import write_json
from data_pipeline.common.problems import join_problems
from data_pipeline.common.tables import counted
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig, caption_key_problems
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.run_indexing import open_manifest
from pretrain.config.evaluation import set_names
from pretrain.config.schema import EvalSet
from pretrain.evaluate.evaluator import Evaluator, SetOptions, evaluation_mode, sample_indices
from pretrain.evaluate.labels import read_labels
from pretrain.evaluate.report import format_examples, format_results
from pretrain.evaluate.trained_model import TrainedModel, load_model

logger = logging.getLogger(__name__)

MAX_PAIRS_WITHOUT_WORKERS = 20_000
"""Smaller sets are read in this process: faster than starting worker processes."""


def eval_command(
    run_dir: Path,
    shards: Sequence[str] | None,
    labels: str | None,
    json_path: Path | None,
    *,
    caption_keys: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run on its evaluation sets, or on others, and print a table.

    Args:
        run_dir: The run folder.
        shards: Manifests, or folders that contain one, instead of the run's sets.
        labels: With `shards`: a file with one candidate caption per line.
        json_path: Also write the results to this file.
        caption_keys: With `shards`: where their captions are, instead of the run's keys.

    Returns:
        Results by name of the set; see `Evaluator.evaluate_set`.
    """
    trained = load_model(run_dir)
    sets = named_sets(shards, labels or "", caption_keys) if shards else trained.run.eval.sets
    if not sets:
        raise ConfigError(f"eval.sets of {run_dir}/config.yaml is empty; pass shards with --shards")

    results = evaluate_sets(trained, sets)
    print(f"{run_dir}, step {trained.step:,} (percent)\n\n{format_results(results)}")
    for name, result in results.items():
        print(f"\n{name}, captions (= exact match):\n{format_examples(result)}")
    if json_path is not None:
        write_json(json_path, results)
        logger.info("wrote %s", json_path)
    return results


def evaluate_sets(trained: TrainedModel, sets: Sequence[EvalSet]) -> dict[str, dict[str, Any]]:
    """Evaluate a model on several sets; results by name of the set."""
    results = {}
    evaluator = make_evaluator(trained)
    for eval_set in sets:
        manifest = open_manifest(eval_set.shards)
        options = SetOptions(
            name=eval_set.name,
            num_pairs=manifest.total_samples,
            caption_samples=trained.run.eval.caption_samples,
            labels=read_labels(eval_set.labels) if eval_set.labels else (),
        )
        logger.info("evaluating %s: %s", eval_set.name, counted(manifest.total_samples, "pair"))
        with evaluation_mode(trained.model):
            batches = read_set(trained, manifest, eval_set.data(trained.run.data))
            results[eval_set.name] = evaluator.evaluate_set(batches, options)
    return results


def evaluate_caption_samples(trained: TrainedModel, eval_set: EvalSet) -> dict[str, Any]:
    """Generated captions only, for `eval.caption_samples` images of any set."""
    manifest, name = open_manifest(eval_set.shards), eval_set.name
    indices = sample_indices(name, manifest.total_samples, trained.run.eval.caption_samples)
    with evaluation_mode(trained.model):
        batches = read_set(trained, manifest, eval_set.data(trained.run.data), indices)
        return make_evaluator(trained).evaluate_captions(batches, name)


def make_evaluator(trained: TrainedModel) -> Evaluator:
    """An evaluator with the settings of the run."""
    return Evaluator(
        model=trained.model,
        tokenizer=trained.tokenizer,
        context_length=trained.run.model.context_length,
        device=trained.device,
        texts_per_forward=trained.run.eval.batch_size,
    )


def read_set(
    trained: TrainedModel,
    manifest: Manifest,
    data: DataConfig,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """All pairs of a set, or those at `indices`, preprocessed as for the run's model; `data` says
    where their images and captions are."""
    run = trained.run
    num_pairs = manifest.total_samples if indices is None else len(indices)
    return read_all(
        manifest,
        tokenizer=trained.tokenizer,
        data=replace(data, cache_dir=data.cache_dir or str(trained.run_dir / "cache")),
        batch=BatchSpec(
            image_size=run.model.image_size,
            context_length=run.model.context_length,
            micro_batch_size=run.eval.batch_size,
        ),
        indices=indices,
        workers=run.data.workers if num_pairs > MAX_PAIRS_WITHOUT_WORKERS else 0,
    )


def named_sets(
    shards: Sequence[str], labels: str = "", caption_keys: Sequence[str] | None = None
) -> tuple[EvalSet, ...]:
    """Evaluation sets with the names that `eval.sets` would give them.

    Args:
        shards: Manifests, or folders that contain one.
        labels: A file with one candidate caption per line, for all of them.
        caption_keys: Where their captions are, instead of the run's keys.

    Raises:
        ConfigError: An address contains a user or password, a caption key is invalid, or shards are
            given twice.
    """
    problems = [text for address in shards for text in userinfo_problems(address, "--shards")]
    if caption_keys is not None:
        problems += caption_key_problems(caption_keys, "--caption-key")
    if problems:
        raise ConfigError(join_problems(problems))
    keys = None if caption_keys is None else tuple(caption_keys)
    names = set_names(shards)
    repeated = [
        address for name, address in zip(names, shards, strict=True) if names.count(name) > 1
    ]
    if repeated:
        given = " and ".join(without_secrets(address) for address in repeated)
        raise ConfigError(f"--shards: {given} are the same shards; give them once")
    return tuple(
        EvalSet(name=name, shards=address, labels=labels, caption_keys=keys)
        for name, address in zip(names, shards, strict=True)
    )
