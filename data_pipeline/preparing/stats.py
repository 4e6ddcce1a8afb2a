"""What datasets are made of: sizes, shapes and kinds of pictures, lengths and scripts of captions,
repeats.

Numbers of samples and bytes come from the manifests and are exact. The rest is measured on samples
drawn at random, unless all are asked for; repeats among a drawn few are far fewer than among all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import WHOLE, Part
from data_pipeline.content.captions import clean_hash
from data_pipeline.content.headers import read_header
from data_pipeline.content.recipe import picture_of
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.captions import all_captions
from data_pipeline.preparing.pictures import format_of
from data_pipeline.preparing.scripts import script_of
from data_pipeline.preparing.visit import ShardTask, Unread, UnreadError, Visits, draw, opened
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

_LONGEST = 1 << 20
"""More tokens than any caption has."""


@dataclass(kw_only=True)
class Stats:
    """What was measured; one entry a sample (or caption) in each list."""

    looked_at: int = 0
    """Samples."""
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    picture_bytes: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    """Hashes of the files."""
    captions_per_key: list[list[int]] = field(default_factory=list)
    """For each sample the number of captions under each key."""
    chars: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Start and end marks included; -1 without a tokenizer."""
    scripts: list[str] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    """Hashes of the first caption of each sample that has one."""
    bad: Counter[str] = field(default_factory=Counter)
    """Samples that cannot be read, by reason."""
    unread: list[Unread] = field(default_factory=list)
    """Shards that could not be had; nothing of them is counted."""

    def quantities(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Everything that is a number, by the name that people see."""
        widths, heights = np.array(self.widths, np.int64), np.array(self.heights, np.int64)
        per_key = np.array(self.captions_per_key, np.int64).reshape(-1, len(keys))
        found = {
            "picture width": widths,
            "picture height": heights,
            "shorter side": np.minimum(widths, heights),
            "width / height": widths / np.maximum(heights, 1),
            "picture bytes": np.array(self.picture_bytes, np.int64),
            "caption characters": np.array(self.chars, np.int64),
            "caption tokens": np.array([count for count in self.tokens if count >= 0], np.int64),
        } | {f"captions in {key}": per_key[:, number] for number, key in enumerate(keys)}
        return {name: values for name, values in found.items() if len(values)}

    def repeats(self) -> dict[str, int]:
        """Samples that come again among those looked at, beyond the first of each."""
        return {
            "equal picture files": len(self.pictures) - len(set(self.pictures)),
            "equal first captions": len(self.captions) - len(set(self.captions)),
        }

    def to_json(self, keys: Sequence[str]) -> dict[str, Any]:
        """All figures."""
        return {
            "looked_at": self.looked_at,
            "quantities": {
                name: _figures(values) for name, values in self.quantities(keys).items()
            },
            "formats": dict(Counter(self.formats).most_common()),
            "scripts": dict(Counter(self.scripts).most_common()),
            "repeats": self.repeats(),
            "bad": dict(self.bad.most_common()),
        }


def measure(
    manifests: Sequence[Manifest],
    *,
    samples: int = 20_000,
    seed: int = 0,
    caption_keys: Sequence[str] = ("txt",),
    tokenizer: str = "",
    workers: int = 0,
    part: Part = WHOLE,
    work: str = "",
) -> Stats:
    """Look at samples of datasets.

    Args:
        manifests: The datasets.
        samples: How many to draw; 0 is all.
        seed: Of the draw.
        caption_keys: Where captions are.
        tokenizer: SentencePiece model file; empty counts no tokens.
        workers: Processes.
        part: Share of the shards.
        work: Where results are kept.

    Raises:
        TokenizerError: The tokenizer cannot be read.
    """
    fingerprint = Tokenizer.load(tokenizer).fingerprint if tokenizer else ""
    meter = _Meter(tuple(caption_keys), tokenizer)
    settings = repr(("stats", 2, meter.caption_keys, fingerprint))
    visits = Visits(label="measuring", workers=workers, work=work, settings=settings)
    stats = Stats()
    for _, result in visits.each(draw(manifests, samples, seed)[part[0] :: part[1]], meter):
        if isinstance(result, Unread):
            stats.unread.append(result)
            continue
        found = json.loads(result)
        stats.bad.update(found.pop("bad"))
        stats.looked_at += found.pop("looked_at")
        for name, values in found.items():
            getattr(stats, name).extend(values)
    return stats


QUANTILES = (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1)


def _figures(values: np.ndarray) -> dict[str, float]:
    names = ("min", "1%", "25%", "median", "75%", "99%", "max")
    quantiles = np.quantile(values, QUANTILES).tolist()
    return {name: round(value, 4) for name, value in zip(names, quantiles, strict=True)} | {
        "mean": round(float(values.mean()), 4)
    }


@dataclass(frozen=True)
class _Meter:
    """Measures the samples of one shard; its result is `Stats` as JSON."""

    caption_keys: tuple[str, ...]
    tokenizer: str

    def __call__(self, task: ShardTask) -> bytes:
        stats, tokenizer = Stats(), Tokenizer.load(self.tokenizer) if self.tokenizer else None
        try:
            with opened(task) as shard:
                for _, raw in shard.samples():
                    self._add(raw, stats, tokenizer)
        except UnreadError:
            raise
        except DataError as error:
            stats.bad[error.slug] += task.num_samples - stats.looked_at
            stats.looked_at = task.num_samples
        return json.dumps(stats.__dict__).encode()

    def _add(self, raw: RawSample | DataError, stats: Stats, tokenizer: Tokenizer | None) -> None:
        stats.looked_at += 1
        try:
            if isinstance(raw, DataError):
                raise raw
            data = picture_of(raw)
            header = read_header(data)
            captions = all_captions(raw, self.caption_keys)
        except DataError as error:
            stats.bad[error.slug] += 1
            return
        stats.widths.append(header.width)
        stats.heights.append(header.height)
        stats.formats.append(format_of(data))
        stats.picture_bytes.append(len(data))
        stats.pictures.append(
            int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        )
        stats.captions_per_key.append([len(found) for found in captions])
        texts = [caption for found in captions for caption in found]
        stats.chars += map(len, texts)
        stats.tokens += [
            len(tokenizer.encode(text, _LONGEST)) if tokenizer else -1 for text in texts
        ]
        stats.scripts += map(script_of, texts)
        stats.captions += [clean_hash(text) for text in texts[:1]]
