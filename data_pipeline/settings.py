"""Settings of the data pipeline.

A training configuration contains a `DataConfig` (in `pretrain`, the section `data:` of a run's
YAML); a program that only needs batches creates one directly. `vlmoe settings data` prints the
docstrings below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data_pipeline.common.addresses import reject_userinfo, without_secrets
from data_pipeline.common.errors import require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    shards: str
    """Address of a manifest (`.../manifest.json`), of a folder that contains one, or of shards
    without a manifest: a folder, braces, wildcards, or a list file `@FILE`; local or in a store."""
    name: str = ""
    """Name in tables and in TensorBoard; empty uses the last component of the address."""
    weight: float | None = None
    """Fraction of every global batch, relative to the weights of the other sources. If no source
    has a weight, all sources are concatenated: one epoch visits every sample `repeats` times."""
    weight_schedule: tuple[tuple[int, float], ...] = ()
    """A weight that changes during training, instead of `weight`: points `[pairs, weight]` with
    pairs counted from the start of training; linear between points, constant before the first and
    after the last."""
    repeats: int = 1
    """How often each sample of this source is visited per epoch; only without weights."""
    drop: str = ""
    """Address of a drop-list (from `vlmoe data dedup`, `filter` or `check`): samples that are never
    read."""

    def __post_init__(self) -> None:
        source = f"data.train source {self.name or without_secrets(self.shards)!r}"
        reject_userinfo(self.shards, "data.train")
        reject_userinfo(self.drop, f"{source}: drop")
        require(
            bool(self.shards),
            "a source of data.train has an empty `shards`; set it to a manifest or a folder",
        )
        require(
            self.weight is None or self.weight >= 0,
            f"{source}: weight is {self.weight}, below 0",
        )
        require(
            self.weight is None or not self.weight_schedule,
            f"{source} has both weight and weight_schedule; set only one",
        )
        require(self.repeats >= 1, f"{source}: repeats is {self.repeats}, below 1")
        points = [pairs for pairs, _ in self.weight_schedule]
        require(
            points == sorted(set(points)) and min(points, default=0) >= 0,
            f"{source}: weight_schedule has points at {points} pairs; they must be increasing and "
            f"not negative",
        )
        require(
            all(weight >= 0 for _, weight in self.weight_schedule),
            f"{source}: weight_schedule has a weight below 0",
        )
        require(
            self.repeats == 1 or (self.weight is None and not self.weight_schedule),
            f"{source} has both repeats and a weight; with a weight, remove repeats",
        )

    def without_secrets(self) -> SourceConfig:
        """A copy for writing to files: addresses without the query of presigned URLs."""
        return replace(self, shards=without_secrets(self.shards), drop=without_secrets(self.drop))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentations of training images, seeded per sample."""

    flip: bool = False
    """Flip horizontally with probability 0.5 (off by default: it mirrors text and arrows)."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the area of a random crop, as a fraction of the image; [1, 1] disables it."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Range of the aspect ratio of a random crop."""
    affine_degrees: float = 0.0
    """Maximum rotation in degrees, in both directions."""
    affine_translate: float = 0.0
    """Maximum translation as a fraction of the image side, in both directions."""
    affine_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the zoom factor."""
    random_background: bool = False
    """Replace transparency by a random color instead of white, with probability 0.5."""
    brightness: float = 0.0
    """Color jitter: the brightness is multiplied by a random factor in [1 - v, 1 + v],
    where v is this value."""
    contrast: float = 0.0
    """Color jitter: the difference from the mean gray is multiplied by a random factor in
    [1 - v, 1 + v]."""
    saturation: float = 0.0
    """Color jitter: the difference from each pixel's gray is multiplied by a random factor
    in [1 - v, 1 + v]."""
    hue: float = 0.0
    """Color jitter: maximum rotation of the hue as a fraction of the full circle, in both
    directions; at most 0.5."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.augment.{name} is {value}, but must be in 0..1")
        require(0 <= self.hue <= 0.5, f"data.augment.hue is {self.hue}, but must be in 0..0.5")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Samples that are skipped, counted by reason; 0 and empty disable a filter.

    Skipped samples are not replaced, so batches become smaller. If many samples are skipped, create
    a drop-list with `vlmoe data filter` instead: samples on it are not even read.
    """

    min_side: int = 0
    """Minimum length of the shorter side of an image in pixels; 0 means no limit."""
    max_aspect: float = 0.0
    """Maximum ratio of the longer to the shorter side of an image; 0 means no limit."""
    min_caption_chars: int = 0
    """Minimum length of a caption in characters; 0 means no limit."""
    max_caption_chars: int = 0
    """Maximum length of a caption in characters; 0 means no limit."""
    require: tuple[str, ...] = ()
    """Conditions on fields of the `.json` member, all of which must hold: `json:similarity >=
    0.28`, `json:NSFW == "UNLIKELY"`, `json:license in ["cc0", "cc-by"]`. A sample without the field
    is skipped."""

    def __post_init__(self) -> None:
        for name in ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars"):
            value = getattr(self, name)
            require(value >= 0, f"data.filters.{name} is {value}, below 0")
        require(
            not 0 < self.max_aspect < 1, f"data.filters.max_aspect is {self.max_aspect}, below 1"
        )


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """Maximum size of a sample; a larger one counts as corrupt."""

    pixels: int = 64 * 2**20
    """Maximum width x height of an image, read from its header before it is decoded."""
    sample_bytes: int = 256 << 20
    """Maximum size of all files of a sample together in bytes."""
    caption_chars: int = 100_000
    """Maximum length of a caption or a text member in characters."""
    json_depth: int = 32
    """Maximum nesting depth of a `.json` member."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data is read, and how samples are made from it."""

    train: tuple[SourceConfig | str, ...] = ()
    """Sources of training data: addresses, or sections with `shards` and further settings (`vlmoe
    settings data.train` lists them)."""
    tokenizer: str = ""
    """Path of the SentencePiece model file."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Where captions are read from: `txt` is the .txt member, `json:NAME` a field of the .json
    member (a string, or a list of strings from which one is sampled)."""
    caption_weights: tuple[float, ...] = (1.0,)
    """Relative probability of each of `caption_keys`; one weight per key."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random augmentations of training images."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Filters: samples that do not meet them are skipped."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """Maximum size of a sample; a larger one counts as corrupt."""
    shuffle_window: int = 256
    """Number of shards whose samples are shuffled together; the order of shards is always
    shuffled."""
    workers: int = 2
    """Number of loader processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Number of micro-batches that each worker prepares ahead."""
    cache_dir: str = ""
    """Local folder for copies of remote shards, shared by the ranks of a node; empty uses a
    subfolder of the run folder."""
    cache_gib: float = 500.0
    """Maximum size of the copies of shards on a node in GiB; the least recently used are deleted
    first. 0 disables caching: every sample is one range request."""
    fetch_ahead: int = 8
    """Number of shards that a node downloads ahead; 0 downloads none and reads samples with range
    requests."""
    max_corrupt_ratio: float = 0.01
    """Stop the run if more than this fraction of the samples (and at least 100) are corrupt."""
    request_seconds: float = 20.0
    """Timeout of one request to a store (8 MiB at most) in seconds, before it is retried."""
    shard_seconds: float = 120.0
    """Time limit for a shard or sample from a store in seconds, including retries; after it, its
    samples count as corrupt."""
    timeout_seconds: float = 300.0
    """Maximum time to wait for a batch in seconds, before the run stops with an error."""
    ledger: bool = False
    """Record the samples of every step in `ledger/` of the run folder (8 bytes per sample)."""

    def __post_init__(self) -> None:
        require(
            len(self.caption_keys) == len(self.caption_weights),
            f"data.caption_weights has {len(self.caption_weights)} values for "
            f"{len(self.caption_keys)} data.caption_keys; set one weight per key",
        )
        require(self.workers >= 0, f"data.workers is {self.workers}, below 0")
        require(self.shuffle_window >= 1, f"data.shuffle_window is {self.shuffle_window}, below 1")
        for name in ("cache_gib", "fetch_ahead"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name} is {value}, below 0")
        for name in ("request_seconds", "shard_seconds", "timeout_seconds"):
            value = getattr(self, name)
            require(value > 0, f"data.{name} is {value}, but must be positive")
        require(
            self.shard_seconds < self.timeout_seconds,
            f"data.shard_seconds is {self.shard_seconds:g}, not below data.timeout_seconds "
            f"({self.timeout_seconds:g}): waiting for a batch would time out first",
        )
        has_weight = [
            bool(source.weight is not None or source.weight_schedule) for source in self.sources
        ]
        require(
            all(has_weight) or not any(has_weight),
            "data.train: some sources have a weight and others do not; set it for all or none",
        )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`train`, with every address as a `SourceConfig`."""
        return to_sources(self.train)

    def without_secrets(self) -> DataConfig:
        """A copy for writing to files: addresses without the query of presigned URLs."""
        train = tuple(
            without_secrets(entry) if isinstance(entry, str) else entry.without_secrets()
            for entry in self.train
        )
        return replace(self, train=train)


def to_sources(entries: Sequence[SourceConfig | str]) -> tuple[SourceConfig, ...]:
    """Convert addresses to sources; sources are unchanged."""
    return tuple(
        SourceConfig(shards=entry) if isinstance(entry, str) else entry for entry in entries
    )
