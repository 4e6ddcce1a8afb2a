"""`vlmoe routing`: reports which tokens each expert of a trained model processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import counted
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.run_indexing import open_manifest
from pretrain.config.schema import RunConfig
from pretrain.evaluate.command import read_set
from pretrain.evaluate.evaluator import evaluation_mode, sample_indices
from pretrain.evaluate.routing.counts import RoutingCounts, record_routing
from pretrain.evaluate.routing.grids import Grid, coactivation_grids, load_grids
from pretrain.evaluate.routing.heatmap import draw_grids
from pretrain.evaluate.routing.html_page import PageImage, routing_page
from pretrain.evaluate.routing.report import Report, routing_report
from pretrain.evaluate.routing.text_table import routing_table
from pretrain.evaluate.routing.words import WordVocabulary
from pretrain.evaluate.trained_model import TrainedModel, load_model

logger = logging.getLogger(__name__)

TRAIN = "train"
"""Name of the training data for `--set`."""


class Counted(NamedTuple):
    """Results of a pass over some samples."""

    counts: RoutingCounts
    words: list[str]
    """Words by their index in the counts."""
    problems: Counter[str]
    """Corrupt samples by reason."""


def routing_command(
    run_dir: Path,
    *,
    name: str = "",
    shards: str = "",
    samples: int = 1000,
    patches: int = 4,
    out: Path | None = None,
) -> Report:
    """Analyze the routing of a run's newest checkpoint.

    Args:
        run_dir: The run folder.
        name: An evaluation set, a source of training data, or `train`; by default the first
            evaluation set, or the training data if there is none.
        shards: Manifest, or a folder that contains one, instead of a set of the run.
        samples: Number of pairs, a fixed random sample.
        patches: Patches to show for each expert; 0 for none.
        out: Folder for `routing.html`, `routing.png` and `routing.json`; None for `routing/` in the
            run folder.

    Raises:
        ConfigError: The run has no experts, or no such set.
        DataError: No sample could be read.
    """
    trained = load_model(run_dir)
    run = trained.run
    blocks = run.moe.blocks(run.model.num_layers)
    if not blocks:
        where = f"moe.start {run.moe.start}, moe.stop {run.moe.stop}"
        raise ConfigError(f"{run_dir} has no layer with experts ({where}): nothing to report")
    label, address, data = (shards, shards, run.data) if shards else resolve_set(run, name)
    manifest = open_manifest(address)
    indices = sample_indices(label, manifest.total_samples, samples)
    logger.info("routing %d of the %d pairs of %s", len(indices), manifest.total_samples, label)
    result = count(trained, read_set(trained, manifest, data, indices), patches=patches)
    if not result.counts.pairs:
        reasons = dict(result.problems)
        wanted = counted(len(indices), "sample")
        raise DataError(f"{address}: none of {wanted} could be read: {reasons}")

    report = {
        "run": str(run_dir),
        "step": trained.step,
        "set": label,
        "shards": address,
        "corrupt_samples": result.problems.total(),
    } | routing_report(result.counts, result.words, run.moe, blocks)
    images = read_images(trained, manifest, data, report)
    title = f"Routing of {run_dir} at step {trained.step:,} on {label}"
    grids = all_grids(result.counts, run)
    page = routing_page(report, grids, images, patch_size=run.model.patch_size, title=title)
    folder = out or run_dir / "routing"
    # Before printing: with `| head`, the program ends while it prints.
    _write(folder, report, grids, page)
    print(
        f"{title}: {counted(result.counts.pairs, 'pair')}\n\n{routing_table(report)}\n\n"
        f"wrote {folder}/routing.html, routing.png and routing.json"
    )
    return report


def resolve_set(run: RunConfig, name: str) -> tuple[str, str, DataConfig]:
    """Name and address of a set, and the settings with which it is read; the default set if `name`
    is empty.

    Raises:
        ConfigError: There is no such set, or the run has no data.
    """
    sets = {item.name: (item.shards, item.data(run.data)) for item in run.eval.sets}
    for source in run.data.sources:
        if source.name:
            sets.setdefault(source.name, (source.shards, run.data.for_source(source)))
    if run.data.sources:
        first = run.data.sources[0]
        sets.setdefault(TRAIN, (first.shards, run.data.for_source(first)))
    if not sets:
        raise ConfigError(
            "the run has no evaluation set and no training data; pass shards with --shards"
        )
    selected = name or next(iter(sets))
    if selected not in sets:
        raise ConfigError(f"--set: the run has no set {selected!r}; available: {', '.join(sets)}")
    return selected, *sets[selected]


def count(trained: TrainedModel, batches: Iterable[Batch], *, patches: int = 4) -> Counted:
    """Run batches through the model and count the assignments of its routers."""
    model, moe = trained.model, trained.run.moe
    counts = RoutingCounts(len(model.moe_layers()), moe.num_experts, patches=patches)
    vocabulary, problems = WordVocabulary(trained.tokenizer), Counter[str]()
    with evaluation_mode(model), record_routing(model) as records:
        for batch in batches:
            problems.update(problem.reason for problem in batch.problems)
            if not batch.captions:
                continue
            inputs = (batch.images, batch.text_ids, batch.text_lengths, batch.text_positions)
            images, ids, lengths, positions = (tensor.to(trained.device) for tensor in inputs)
            model(images, ids, lengths, model.token_batch(ids, positions))
            counts.add(records, word_indices(vocabulary, batch), batch.ids.numpy())
    if problems:
        number = counted(problems.total(), "corrupt sample")
        logger.warning("skipped %s: %s", number, dict(problems))
    return Counted(counts, vocabulary.words, problems)


def word_indices(vocabulary: WordVocabulary, batch: Batch) -> np.ndarray:
    """Word index of each text token of a batch, in the order of the model's input."""
    rows = zip(batch.text_ids.tolist(), batch.text_lengths.tolist(), strict=True)
    return np.concatenate([vocabulary.word_indices(ids[:length]) for ids, length in rows])


def all_grids(counts: RoutingCounts, run: RunConfig) -> list[Grid]:
    """Load by modality and, with `top_k` above 1, coactivation by layer and modality."""
    blocks = run.moe.blocks(run.model.num_layers)
    grids = load_grids(counts.load_LME, blocks, run.moe)
    if run.moe.top_k > 1:
        for column, modality in enumerate(("image", "text")):
            coactivation_LEE = counts.coactivation_LMEE[:, column]
            grids += coactivation_grids(coactivation_LEE, blocks, run.moe, f", {modality} tokens")
    return grids


def read_images(
    trained: TrainedModel, manifest: Manifest, data: DataConfig, report: Report
) -> dict[int, PageImage]:
    """The images of all patches in the report, by sample index."""
    samples: set[int] = set()
    for layer in report["layers"]:
        for expert in layer["experts"]:
            samples.update(patch["sample"] for patch in expert["patches"])

    images: dict[int, PageImage] = {}
    for batch in read_set(trained, manifest, data, sorted(samples)) if samples else ():
        rows = zip(batch.ids.tolist(), batch.images, batch.captions, batch.keys, strict=True)
        for sample, image, caption, key in rows:
            # Copied: the memory of the batch is reused.
            images[sample] = PageImage(image.numpy().copy(), caption, key)
    return images


def _write(folder: Path, report: Report, grids: Sequence[Grid], page: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "routing.json", report)
    draw_grids(grids).save(folder / "routing.png")
    storage.write_bytes(str(folder / "routing.html"), page.encode())
