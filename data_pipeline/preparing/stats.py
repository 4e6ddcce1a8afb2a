"""Dataset statistics: image sizes and formats, caption lengths and scripts, duplicates.

Numbers of samples and bytes come from the manifests and are exact. All other statistics are
measured on a random subset unless all samples are requested; a subset contains far fewer duplicates
than the whole dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.content.caption_characters import removed_kinds
from data_pipeline.content.captions import SampleTexts, hash_clean_caption
from data_pipeline.content.image import image_format, read_header
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.shard_access import ShardUnavailableError, read_samples
from data_pipeline.preparing.shard_map import ShardMap, UnavailableShard
from data_pipeline.preparing.tasks import ShardTask, sample_tasks
from data_pipeline.preparing.unicode_scripts import script_of
from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys, image_bytes
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import Manifest

_MAX_TOKENS = 1 << 20
"""More tokens than any caption has, so that no caption is truncated."""
_QUANTILES = {"min": 0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "max": 1}


@dataclass(kw_only=True)
class Stats:
    """Measurements; each list has one entry per readable sample, or per caption."""

    num_samples: int = 0
    """Number of measured samples, unreadable ones included."""
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    file_bytes: list[int] = field(default_factory=list)
    """Sizes of the image files."""
    file_hashes: list[int] = field(default_factory=list)
    """Hashes of the image files."""
    captions_per_key: list[list[int]] = field(default_factory=list)
    """For each sample, the number of captions under each key."""
    caption_chars: list[int] = field(default_factory=list)
    caption_tokens: list[int] = field(default_factory=list)
    """Including start and end tokens; -1 without a tokenizer."""
    scripts: list[str] = field(default_factory=list)
    caption_hashes: list[int] = field(default_factory=list)
    """Hashes of the first caption of each sample that has one."""
    removed_characters: Counter[str] = field(default_factory=Counter)
    """Number of captions from which cleaning removed characters, by kind of character."""
    corrupt: Counter[str] = field(default_factory=Counter)
    """Number of unreadable samples by reason."""
    unavailable: list[UnavailableShard] = field(default_factory=list)
    """Shards that could not be read; they are not counted."""

    def quantities(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """All numeric measurements by display name."""
        widths, heights = np.array(self.widths, np.int64), np.array(self.heights, np.int64)
        tokens = [count for count in self.caption_tokens if count >= 0]
        quantities = {
            "image width": widths,
            "image height": heights,
            "shorter side": np.minimum(widths, heights),
            "width / height": widths / np.maximum(heights, 1),
            "image bytes": np.array(self.file_bytes, np.int64),
            "caption characters": np.array(self.caption_chars, np.int64),
            "caption tokens": np.array(tokens, np.int64),
        }

        per_key = np.array(self.captions_per_key, np.int64).reshape(-1, len(keys))
        for index, key in enumerate(keys):
            quantities[f"captions in {key}"] = per_key[:, index]

        return {name: values for name, values in quantities.items() if len(values)}

    def duplicates(self) -> dict[str, int]:
        """Number of duplicates among the measured samples, not counting each first occurrence."""
        return {
            "equal image files": len(self.file_hashes) - len(set(self.file_hashes)),
            "equal first captions": len(self.caption_hashes) - len(set(self.caption_hashes)),
        }

    def to_json(self, keys: Sequence[str]) -> dict[str, Any]:
        """All statistics as JSON values."""
        quantities = {name: _summarize(values) for name, values in self.quantities(keys).items()}
        return {
            "measured_samples": self.num_samples,
            "quantities": quantities,
            "formats": dict(Counter(self.formats).most_common()),
            "scripts": dict(Counter(self.scripts).most_common()),
            "removed_characters": dict(self.removed_characters.most_common()),
            "duplicates": self.duplicates(),
            "corrupt": dict(self.corrupt.most_common()),
        }


def compute_stats(
    manifests: Sequence[Manifest],
    *,
    samples: int = 20_000,
    seed: int = 0,
    keys: SampleKeys = DEFAULT_KEYS,
    tokenizer: str = "",
    workers: int = 0,
    part: Part = SINGLE_PART,
    work_dir: str = "",
) -> Stats:
    """Measure samples of datasets.

    Args:
        manifests: The datasets.
        samples: Number of random samples; 0 measures all.
        seed: Random seed for choosing samples.
        keys: Where images and captions are.
        tokenizer: SentencePiece model file; empty counts no tokens.
        workers: Number of processes.
        part: Part of the shards to process; see `shard_tasks`.
        work_dir: Folder of stored results; see `ShardMap`.

    Raises:
        TokenizerError: The tokenizer cannot be read.
    """
    fingerprint = Tokenizer.load(tokenizer).fingerprint if tokenizer else ""
    measure = _ShardStats(keys, tokenizer)
    settings = repr(("stats", 4, measure.keys, fingerprint))
    shard_map = ShardMap(label="measuring", workers=workers, work_dir=work_dir, settings=settings)

    stats = Stats()
    index, count = part
    tasks = sample_tasks(manifests, samples, seed)[index::count]
    for _, result in shard_map.run(tasks, measure):
        if isinstance(result, UnavailableShard):
            stats.unavailable.append(result)
            continue

        shard_stats = json.loads(result)
        stats.corrupt.update(shard_stats.pop("corrupt"))
        stats.removed_characters.update(shard_stats.pop("removed_characters"))
        stats.num_samples += shard_stats.pop("num_samples")
        for name, values in shard_stats.items():
            getattr(stats, name).extend(values)

    return stats


def _summarize(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, list(_QUANTILES.values())).tolist()
    summary = {name: round(value, 4) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    return summary | {"mean": round(float(values.mean()), 4)}


@dataclass(frozen=True)
class _ShardStats:
    """Measures the samples of one shard; the result is `Stats` as JSON."""

    keys: SampleKeys
    tokenizer: str

    def __call__(self, task: ShardTask) -> bytes:
        stats, tokenizer = Stats(), Tokenizer.load(self.tokenizer) if self.tokenizer else None
        try:
            for _, raw in read_samples(task):
                self._add(raw, stats, tokenizer)
        except ShardUnavailableError:
            raise
        except DataError as error:
            stats.corrupt[error.slug] += task.num_samples - stats.num_samples
            stats.num_samples = task.num_samples
        return json.dumps(stats.__dict__).encode()

    def _add(
        self, raw: RawSample | SampleProblem, stats: Stats, tokenizer: Tokenizer | None
    ) -> None:
        stats.num_samples += 1
        if isinstance(raw, SampleProblem):
            stats.corrupt[raw.reason] += 1
            return

        try:
            data = image_bytes(raw, self.keys.images)
            header = read_header(data)
            texts = SampleTexts(raw.members)
            captions = [texts.find_captions(key) for key in self.keys.captions]
            stored = chain.from_iterable(map(texts.raw_texts, self.keys.captions))
            stats.removed_characters.update(chain.from_iterable(map(removed_kinds, stored)))
        except DataError as error:
            stats.corrupt[error.slug] += 1
            return

        stats.widths.append(header.width)
        stats.heights.append(header.height)
        stats.formats.append(image_format(data))
        stats.file_bytes.append(len(data))
        file_hash = hashlib.blake2b(data, digest_size=8).digest()
        stats.file_hashes.append(int.from_bytes(file_hash, "little"))

        stats.captions_per_key.append([len(key_captions) for key_captions in captions])
        flat = list(chain.from_iterable(captions))
        for caption in flat:
            stats.caption_chars.append(len(caption))
            tokens = len(tokenizer.encode(caption, _MAX_TOKENS)) if tokenizer else -1
            stats.caption_tokens.append(tokens)
            stats.scripts.append(script_of(caption))
        if flat:
            stats.caption_hashes.append(hash_clean_caption(flat[0]))
