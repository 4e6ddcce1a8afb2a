"""From packages to shards: fetch, collect, split, render, write, learn the tokenizer.

    OUT/train/           shards and manifest.json to train on
    OUT/unseen_style/    drawings by a vendor that training never sees
    OUT/unseen_concept/  concepts that training never sees, and labels.txt with their captions
    OUT/tokenizer.model  learnt from the training captions
    OUT/ATTRIBUTION.md   whom to thank, and under which licences
    OUT/stamp.json       what it was made from, and every file's hash

A call that finds all of that whole returns at once. One that was interrupted goes on: tarballs and
rendered chunks are kept in OUT/downloads and OUT/.rendered.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from data_pipeline.common.seeds import named_seed
from data_pipeline.content.tokenizer import train_tokenizer
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from tools.quickstart_data import stamp
from tools.quickstart_data.captions import Concept, Phrases, variants
from tools.quickstart_data.collect import Drawing, collect, load_concepts
from tools.quickstart_data.fetch import fetch
from tools.quickstart_data.render import SIDE, VERSION, render_all
from tools.quickstart_data.sources import EMOJIBASE, SOURCES, attribution, packages
from tools.quickstart_data.split import SPLITS, Split, is_held_out, split_of

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 512
CAPTION_KEYS = ("txt", "json:captions")
"""Where captions are in a sample: the canonical one, and all the ways to say it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked for."""

    out: Path
    """Folder of the set."""
    limit: int = 0
    """Most drawings of each source, for small test sets; 0 takes all."""
    vocab_size: int = 2048
    """Ids of the tokenizer; with a limit there may be fewer."""
    processes: int = 0
    """How many render at once; 0 means one a core."""


def build(settings: Settings) -> dict[str, Any]:
    """Have the set whole in `settings.out`, and return its counts.

    Returns:
        `{"pictures": {split: n}, "captions": {split: n}, "sources": {source: n}, "vocab_size": n}`.

    Raises:
        DataError: A package cannot be had or is not the one expected.
    """
    out = settings.out
    asked: dict[str, object] = {
        "limit": settings.limit,
        "vocab": settings.vocab_size,
        "render": [SIDE, VERSION],
    }
    made_from = stamp.fingerprint(asked, [package.integrity for package in packages()])
    facts, reason = stamp.read_if_whole(out, made_from)
    if facts is not None:
        logger.info("%s is complete and whole; nothing to do", out)
        return facts
    logger.info("building the quickstart set in %s: %s", out, reason)
    out.mkdir(parents=True, exist_ok=True)
    stamp.forget(out)

    tarballs = fetch(packages(), out / "downloads")
    concepts = load_concepts(tarballs[EMOJIBASE])
    drawings: list[Drawing] = []
    for source in SOURCES:
        drawings += _first(collect(source, tarballs[source.package], concepts), settings.limit)
    pictures = render_all(drawings, out / ".rendered", processes=settings.processes)

    drawings = [drawing for drawing in drawings if drawing.key in pictures]
    counts = Counter(drawing.source for drawing in drawings)
    facts = {"pictures": {}, "captions": {}, "sources": dict(counts)}
    for split in SPLITS:
        chosen = in_split(drawings, split)
        _write(out, split, chosen, pictures, concepts)
        facts["pictures"][split] = len(chosen)
        facts["captions"][split] = len({drawing.concept.caption for drawing in chosen})
    logger.info("learning the tokenizer")
    tokenizer = train_tokenizer(
        captions_of([load_manifest(str(out / "train"))], CAPTION_KEYS),
        out / "tokenizer.model",
        vocab_size=settings.vocab_size,
        exact=not settings.limit,
    )
    facts["vocab_size"] = tokenizer.vocab_size
    (out / "ATTRIBUTION.md").write_text(attribution(counts), encoding="utf-8")
    stamp.write(out, made_from, _files(out), facts)
    shutil.rmtree(out / ".rendered")
    return facts


def in_split(drawings: Sequence[Drawing], split: Split) -> list[Drawing]:
    """The drawings of one set, in an order that mixes sources and concepts; always the same."""
    chosen = [
        drawing
        for drawing in drawings
        if split_of(drawing.source, drawing.concept.hexcode) == split
    ]
    return sorted(chosen, key=lambda drawing: named_seed("quickstart order", drawing.key))


def sample(drawing: Drawing, picture: bytes, withheld: Phrases | None) -> dict[str, object]:
    """One sample as WebDataset stores it."""
    concept, source = drawing.concept, next(s for s in SOURCES if s.key == drawing.source)
    return {
        "__key__": drawing.key,
        "webp": picture,
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


def _write(
    out: Path,
    split: Split,
    drawings: list[Drawing],
    pictures: dict[str, bytes],
    concepts: list[Concept],
) -> None:
    """Write one set's folder anew."""
    folder = out / split
    for path in _written(folder):  # nothing else: the folder may be a person's own
        path.unlink()
    withheld = Phrases(concept.caption for concept in concepts if is_held_out(concept.hexcode))
    hide = withheld if split == "train" else None
    if not drawings:
        raise DataError(f"no drawing is left for {split}; give a larger --limit")
    logger.info("writing %d pictures to %s", len(drawings), folder)
    write_shards(
        (sample(drawing, pictures[drawing.key], hide) for drawing in drawings),
        folder,
        samples_per_shard=SAMPLES_PER_SHARD,
        about={
            "name": f"quickstart {split}",
            "picture_pixels": SIDE,
            "attribution": "../ATTRIBUTION.md",
        },
    )
    if split == "unseen_concept":
        labels = sorted({drawing.concept.caption for drawing in drawings})
        (folder / "labels.txt").write_text(
            "".join(f"{label}\n" for label in labels), encoding="utf-8"
        )


def _first(drawings: list[Drawing], limit: int) -> list[Drawing]:
    """All, or `limit` of them; which ones hangs on the concept, so sources keep concepts in
    common."""
    if not limit:
        return drawings

    def order(drawing: Drawing) -> int:
        return named_seed("quickstart limit", drawing.concept.caption)

    return sorted(drawings, key=order)[:limit]


def _written(folder: Path) -> list[Path]:
    """What `_write` puts into a set's folder."""
    patterns = ("shard-*.tar", "shard-*.tar.index", "manifest.json", "labels.txt")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _files(out: Path) -> list[str]:
    """Everything the stamp vouches for."""
    found = [out / "tokenizer.model", out / "ATTRIBUTION.md"]
    for split in SPLITS:
        found += _written(out / split)
    return [path.relative_to(out).as_posix() for path in found]
