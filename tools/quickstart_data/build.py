"""Builds the data set from packages: fetch, collect, split, render, write, train the tokenizer.

    OUT/train/           shards and manifest.json of the training set
    OUT/unseen_style/    drawings by a vendor that is not in the training set
    OUT/unseen_concept/  concepts that are not in the training set; labels.txt lists their captions
    OUT/tokenizer.model  trained on the training captions
    OUT/ATTRIBUTION.md   authors and licenses
    OUT/stamp.json       fingerprint of the inputs, and a hash of every file

If all of these are complete, a call returns immediately. An interrupted call is resumed: tarballs
and rendered chunks are kept in OUT/downloads and OUT/.rendered.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError
from data_pipeline.common.seeds import named_seed
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from tools.quickstart_data import stamp
from tools.quickstart_data.captions import Concept, PhraseSet, variants
from tools.quickstart_data.collect import Drawing, collect, load_concepts
from tools.quickstart_data.fetch import fetch
from tools.quickstart_data.render import SIDE, VERSION, render_all
from tools.quickstart_data.sources import EMOJIBASE, SOURCES, attribution, packages
from tools.quickstart_data.split import SPLITS, Split, is_held_out, split_of

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 512
CAPTION_KEYS = ("txt", "json:captions")
"""Captions of a sample: the canonical one, and all variants."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Options of a build."""

    out: Path
    """Output folder."""
    limit: int = 0
    """Maximum number of drawings per source, for small test sets; 0 means all."""
    vocab_size: int = 2048
    """Vocabulary size of the tokenizer; with a limit it may be smaller."""
    processes: int = 0
    """Rendering processes; 0 means one per core, at most 8."""


class RenderedSet(NamedTuple):
    """All drawings that were rendered, before the split."""

    drawings: list[Drawing]
    images: dict[str, bytes]
    """WebP bytes by key."""
    concepts: list[Concept]


def build(settings: BuildSettings) -> dict[str, Any]:
    """Build the data set in `settings.out`, unless it is complete, and return its counts.

    Returns:
        `{"images": {split: n}, "captions": {split: n}, "sources": {source: n}, "vocab_size": n}`.

    Raises:
        DataError: A package cannot be downloaded or has an unexpected hash.
    """
    out = settings.out
    inputs: dict[str, object] = {
        "limit": settings.limit,
        "vocab": settings.vocab_size,
        "render": [SIDE, VERSION],
    }
    fingerprint = stamp.fingerprint(inputs, [package.integrity for package in packages()])
    counts, reason = stamp.read_if_complete(out, fingerprint)
    if counts is not None:
        logger.info("%s is complete; nothing to do", out)
        return counts
    logger.info("building the quickstart data set in %s: %s", out, reason)
    out.mkdir(parents=True, exist_ok=True)
    stamp.remove(out)

    rendered = _render(settings)
    counts = _write_splits(out, rendered)
    logger.info("training the tokenizer")
    tokenizer = train_tokenizer(
        iter_captions([load_manifest(str(out / "train"))], CAPTION_KEYS),
        out / "tokenizer.model",
        vocab_size=settings.vocab_size,
        exact=not settings.limit,
    )
    counts["vocab_size"] = tokenizer.vocab_size
    (out / "ATTRIBUTION.md").write_text(attribution(counts["sources"]), encoding="utf-8")
    stamp.write(out, fingerprint, _output_files(out), counts)
    shutil.rmtree(out / ".rendered")
    return counts


def _render(settings: BuildSettings) -> RenderedSet:
    """Fetch the packages and render all drawings with a concept."""
    tarballs = fetch(packages(), settings.out / "downloads")
    concepts = load_concepts(tarballs[EMOJIBASE])
    drawings: list[Drawing] = []
    for source in SOURCES:
        drawings += _limited(collect(source, tarballs[source.package], concepts), settings.limit)
    images = render_all(drawings, settings.out / ".rendered", processes=settings.processes)
    drawings = [drawing for drawing in drawings if drawing.key in images]
    return RenderedSet(drawings, images, concepts)


def _write_splits(out: Path, rendered: RenderedSet) -> dict[str, Any]:
    """Write the shards of every split; returns the counts."""
    sources = Counter(drawing.source for drawing in rendered.drawings)
    counts: dict[str, Any] = {"images": {}, "captions": {}, "sources": dict(sources)}
    for split in SPLITS:
        drawings = in_split(rendered.drawings, split)
        _write_split(out / split, split, drawings, rendered)
        counts["images"][split] = len(drawings)
        counts["captions"][split] = len({drawing.concept.caption for drawing in drawings})
    return counts


def in_split(drawings: Sequence[Drawing], split: Split) -> list[Drawing]:
    """The drawings of one split, in a deterministic random order."""
    selected = [
        drawing
        for drawing in drawings
        if split_of(drawing.source, drawing.concept.hexcode) == split
    ]
    return sorted(selected, key=lambda drawing: named_seed("quickstart order", drawing.key))


def make_sample(drawing: Drawing, image: bytes, withheld: PhraseSet | None) -> dict[str, object]:
    """A WebDataset sample; captions and tags without `withheld` phrases."""
    concept = drawing.concept
    source = next(source for source in SOURCES if source.key == drawing.source)
    return {
        "__key__": drawing.key,
        "webp": image,
        "txt": concept.caption,
        "json": {
            "caption": concept.caption,
            "captions": variants(concept, withheld),
            "tags": [tag for tag in concept.tags if withheld is None or tag not in withheld],
            "group": concept.group,
            "subgroup": concept.subgroup,
            "hexcode": concept.hexcode,
            "source": source.title,
            "style": source.key,
            "author": source.author,
            "license": source.license,
            "license_url": source.license_url,
            "url": source.url,
        },
    }


def _write_split(
    folder: Path, split: Split, drawings: list[Drawing], rendered: RenderedSet
) -> None:
    """Write one split's folder."""
    # Only files of an earlier build are deleted: the user may keep other files there.
    for path in _split_files(folder):
        path.unlink()
    if not drawings:
        raise DataError(f"no drawings for the split {split}; increase --limit")

    withheld = None
    if split == "train":
        held_out = [concept for concept in rendered.concepts if is_held_out(concept.hexcode)]
        withheld = PhraseSet(concept.caption for concept in held_out)
    logger.info("writing %d images to %s", len(drawings), folder)
    write_shards(
        (make_sample(drawing, rendered.images[drawing.key], withheld) for drawing in drawings),
        folder,
        samples_per_shard=SAMPLES_PER_SHARD,
        metadata={
            "name": f"quickstart {split}",
            "image_size": SIDE,
            "attribution": "../ATTRIBUTION.md",
        },
    )
    if split == "unseen_concept":
        labels = sorted({drawing.concept.caption for drawing in drawings})
        lines = "".join(f"{label}\n" for label in labels)
        (folder / "labels.txt").write_text(lines, encoding="utf-8")


def _limited(drawings: list[Drawing], limit: int) -> list[Drawing]:
    """`limit` of the drawings (0: all), selected by concept, so that sources share concepts."""
    if not limit:
        return drawings

    def order(drawing: Drawing) -> int:
        return named_seed("quickstart limit", drawing.concept.caption)

    return sorted(drawings, key=order)[:limit]


def _split_files(folder: Path) -> list[Path]:
    """Files that `_write_split` writes."""
    patterns = ("shard-*.tar", "shard-*.tar.index", "manifest.json", "labels.txt")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _output_files(out: Path) -> list[str]:
    """All files that the stamp covers, relative to `out`."""
    paths = [out / "tokenizer.model", out / "ATTRIBUTION.md"]
    for split in SPLITS:
        paths += _split_files(out / split)
    return [path.relative_to(out).as_posix() for path in paths]
