"""`vlmoe routing`: what the experts of a trained run do, as a table, a page, a picture and JSON."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.samples import Batch
from data_pipeline.shards.manifest import Manifest, load_manifest
from pretrain.config.schema import RunConfig
from pretrain.evaluate.command import open_set
from pretrain.evaluate.judge import choose_samples, judging
from pretrain.evaluate.report import write_json
from pretrain.evaluate.routing.figure import draw_grids
from pretrain.evaluate.routing.grids import Grid, coactivation_grids, load_grids
from pretrain.evaluate.routing.page import PagePicture, routing_page
from pretrain.evaluate.routing.report import Report, routing_report
from pretrain.evaluate.routing.tally import Tally, watch
from pretrain.evaluate.routing.text import routing_table
from pretrain.evaluate.routing.words import WordVocabulary
from pretrain.evaluate.trained import Trained, load_trained

logger = logging.getLogger(__name__)

TRAIN = "train"
"""The name by which the training shards are asked for."""


class Counted(NamedTuple):
    """What a pass over some samples gave."""

    tally: Tally
    words: list[str]
    problems: Counter[str]


def routing_command(
    run_dir: Path,
    *,
    name: str = "",
    shards: str = "",
    samples: int = 1000,
    patches: int = 4,
    out: Path | None = None,
) -> Report:
    """Look at the routing of a run's newest checkpoint.

    Args:
        run_dir: The run's folder.
        name: Of a held-out set, or of a source of training data, or `train`; by default the first
            held-out set, or the training data where there is none.
        shards: A manifest, or the folder that holds one, instead.
        samples: Pairs to look at; a fixed random choice.
        patches: Patches to show of each expert; 0 for none.
        out: Folder for `routing.html`, `routing.png` and `routing.json`; `routing/` in the run's
            folder by default.

    Raises:
        ConfigError: The run has no experts, or no such set.
        DataError: No sample could be read.
    """
    trained = load_trained(run_dir)
    run = trained.run
    blocks = run.moe.blocks(run.model.num_layers)
    if not blocks:
        raise ConfigError(
            f"{run_dir} has no block with experts (moe.start {run.moe.start}, moe.stop {run.moe.stop}): "
            f"there is no routing to look at"
        )
    label, address = (shards, shards) if shards else find_set(run, name)
    manifest = load_manifest(address)
    indices = choose_samples(label, manifest.total_samples, samples)
    logger.info("looking at %d of the %d pairs of %s", len(indices), manifest.total_samples, label)
    counted = count(trained, open_set(trained, manifest, indices), patches=patches)
    if not counted.tally.pairs:
        raise DataError(
            f"none of the {len(indices)} samples of {address} could be read: {dict(counted.problems)}"
        )
    head = {
        "run": str(run_dir),
        "step": trained.step,
        "set": label,
        "shards": address,
        "bad_samples": counted.problems.total(),
    }
    report = head | routing_report(counted.tally, counted.words, run.moe, blocks)
    pictures = read_pictures(trained, manifest, report)
    title = f"Routing of {run_dir} at step {trained.step:,} on {label}"
    target = out or run_dir / "routing"
    # Before the table: whoever reads it through `head` ends the program there.
    _write(target, report, all_grids(counted.tally, run), pictures, run.model.patch_size, title)
    print(
        f"{title}: {counted.tally.pairs:,} pairs\n\n{routing_table(report)}\n\n"
        f"wrote {target}/routing.html, routing.png and routing.json"
    )
    return report


def find_set(run: RunConfig, name: str) -> tuple[str, str]:
    """Name and address of the samples that `name` means.

    Raises:
        ConfigError: There is no such set, or none at all.
    """
    known = {one.name: one.shards for one in run.eval.sets}
    known |= {
        source.name: source.shards
        for source in run.data.sources
        if source.name and source.name not in known
    }
    if run.data.sources:
        known.setdefault(TRAIN, run.data.sources[0].shards)
    if not known:
        raise ConfigError(
            "the run names no held-out set and no training data; name shards with --shards"
        )
    chosen = name or next(iter(known))
    if chosen not in known:
        raise ConfigError(f"the run has no set called {chosen!r}; it has {', '.join(known)}")
    return chosen, known[chosen]


def count(trained: Trained, batches: Iterable[Batch], *, patches: int = 4) -> Counted:
    """Send batches through the model and count what its routers decide."""
    model, moe = trained.model, trained.run.moe
    tally = Tally(len(model.moe_layers()), moe.num_experts, patches=patches)
    book, problems = WordVocabulary(trained.tokenizer), Counter[str]()
    with judging(model), watch(model) as seen:
        for batch in batches:
            problems.update(problem.reason for problem in batch.problems)
            if not batch.captions:
                continue
            inputs = (batch.images, batch.text_ids, batch.text_lengths, batch.text_positions)
            model(*(tensor.to(trained.device) for tensor in inputs))
            tally.add(seen, word_numbers(book, batch), batch.ids.numpy())
    if problems:
        logger.warning("%d bad samples left out: %s", problems.total(), dict(problems))
    return Counted(tally, book.words, problems)


def word_numbers(book: WordVocabulary, batch: Batch) -> np.ndarray:
    """The word of each text token of a batch, in the order in which the model sees them."""
    rows = zip(batch.text_ids.tolist(), batch.text_lengths.tolist(), strict=True)
    return np.concatenate([book.numbers(ids[:length]) for ids, length in rows])


def all_grids(tally: Tally, run: RunConfig) -> list[Grid]:
    """Load of each modality, and for several experts a token which are chosen together, by layer
    and modality."""
    blocks = run.moe.blocks(run.model.num_layers)
    grids = load_grids(tally.visits_LME, blocks, run.moe)
    if run.moe.top_k > 1:
        for column, modality in enumerate(("image", "text")):
            grids += coactivation_grids(
                tally.together_LMEE[:, column], blocks, run.moe, f", {modality} tokens"
            )
    return grids


def read_pictures(trained: Trained, manifest: Manifest, report: Report) -> dict[int, PagePicture]:
    """The pictures of all patches that the report names, by number of the sample."""
    wanted = sorted(
        {
            patch["sample"]
            for layer in report["layers"]
            for expert in layer["experts"]
            for patch in expert["patches"]
        }
    )
    found: dict[int, PagePicture] = {}
    for batch in open_set(trained, manifest, wanted) if wanted else ():
        rows = zip(batch.ids.tolist(), batch.images, batch.captions, batch.keys, strict=True)
        # A copy, since the batch's memory is used again.
        found |= {
            number: PagePicture(image.numpy().copy(), caption, key)
            for number, image, caption, key in rows
        }
    return found


def _write(
    out: Path,
    report: Report,
    grids: Sequence[Grid],
    pictures: dict[int, PagePicture],
    patch_size: int,
    title: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "routing.json", report)
    draw_grids(grids).save(out / "routing.png")
    page = routing_page(report, grids, pictures, patch_size=patch_size, title=title)
    (out / "routing.html").write_text(page, encoding="utf-8")
