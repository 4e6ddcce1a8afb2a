"""How data are read: every setting of the pipeline in one typed place, each with its unit.

A trainer's own configuration holds a `DataConfig` (in `pretrain` it is the section `data:` of a
run's YAML); a program that only wants batches makes one by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data_pipeline.common.addresses import refuse_user, without_secrets
from data_pipeline.common.errors import require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    shards: str
    """A manifest (`.../manifest.json`), a folder that holds one, or shards without one: a folder,
    braces, wildcards, or a list file `@FILE`; local or in a store."""
    name: str = ""
    """How tables and TensorBoard call it; empty is the last part of the address."""
    weight: float | None = None
    """Its share of every global batch, relative to the other sources. None for all of them draws
    from all samples alike: each comes once (times `repeats`) before any comes again."""
    weight_schedule: tuple[tuple[int, float], ...] = ()
    """Instead of `weight`: points `[pairs, weight]`, pairs counted from the start of training,
    straight lines between them, constant before the first and after the last."""
    repeats: int = 1
    """How often each of its samples comes before one pass over the data is over; without weights
    only."""
    drop: str = ""
    """A drop-list (`vlmoe data dedup`, `vlmoe data check`): samples that are never read."""

    def __post_init__(self) -> None:
        who = f"data.train source {self.name or without_secrets(self.shards)!r}"
        refuse_user(self.shards, "data.train")
        refuse_user(self.drop, f"{who}: drop")
        require(
            bool(self.shards),
            "a source of data.train has an empty `shards`; name a manifest or a folder",
        )
        require(self.weight is None or self.weight >= 0, f"{who}: weight is {self.weight}, below 0")
        require(
            self.weight is None or not self.weight_schedule,
            f"{who} has both weight and weight_schedule; give one",
        )
        require(self.repeats >= 1, f"{who}: repeats is {self.repeats}, below 1")
        points = [pairs for pairs, _ in self.weight_schedule]
        require(
            points == sorted(set(points)) and min(points, default=0) >= 0,
            f"{who}: weight_schedule has its points at {points} pairs; they must rise from 0 or more",
        )
        require(
            all(weight >= 0 for _, weight in self.weight_schedule),
            f"{who}: weight_schedule has a weight below 0",
        )
        require(
            self.repeats == 1 or (self.weight is None and not self.weight_schedule),
            f"{who} has both repeats and a weight; a weight alone decides how often it comes",
        )

    def without_secrets(self) -> SourceConfig:
        """As it may be written down: addresses without the signatures of presigned queries."""
        return replace(self, shards=without_secrets(self.shards), drop=without_secrets(self.drop))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changes made to training pictures, drawn from the sample's own seed."""

    flip: bool = False
    """Mirror left-right with probability one half (wrong for text and arrows: off by default)."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the share of the area that a random crop keeps; (1, 1) is no random crop."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Range of the aspect ratio of a random crop."""
    affine_degrees: float = 0.0
    """Largest rotation, degrees, either way."""
    affine_translate: float = 0.0
    """Largest shift, as a share of the side, either way."""
    affine_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the zoom factor."""
    random_background: bool = False
    """Put pictures that have transparency on a random color instead of white, half of the time."""
    brightness: float = 0.0
    """Color jitter: the brightness is multiplied by up to 1 plus or minus this."""
    contrast: float = 0.0
    """Color jitter: the distance from the mean gray is multiplied by up to 1 plus or minus
    this."""
    saturation: float = 0.0
    """Color jitter: the distance from each pixel's gray is multiplied by up to 1 plus or minus
    this."""
    hue: float = 0.0
    """Color jitter: colors turn by up to this share of the color circle, either way; at most
    0.5."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.augment.{name} is {value}, but must lie in 0..1")
        require(0 <= self.hue <= 0.5, f"data.augment.hue is {self.hue}, but must lie in 0..0.5")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Samples that are left out, counted by reason; 0 and empty turn a filter off.

    A batch is smaller by what is left out of it. Where that is much, make a drop-list with
    `vlmoe data filter`, so that such samples are not even read.
    """

    min_side: int = 0
    """Shortest side of a picture, pixels."""
    max_aspect: float = 0.0
    """Largest ratio of the longer to the shorter side."""
    min_caption_chars: int = 0
    """Shortest caption, characters."""
    max_caption_chars: int = 0
    """Longest caption, characters."""
    require: tuple[str, ...] = ()
    """Conditions on fields of the `.json` member, all of which must hold: `json:similarity >=
    0.28`, `json:NSFW == "UNLIKELY"`, `json:license in ["cc0", "cc-by"]`. A sample without the field
    is left out."""

    def __post_init__(self) -> None:
        for name in ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars"):
            require(
                getattr(self, name) >= 0, f"data.filters.{name} is {getattr(self, name)}, below 0"
            )
        require(
            not 0 < self.max_aspect < 1, f"data.filters.max_aspect is {self.max_aspect}, below 1"
        )


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """What a sample may ask for at most; beyond it the sample counts as bad."""

    pixels: int = 64 * 2**20
    """Width x height of a picture, read from its header before it is decoded."""
    sample_bytes: int = 256 << 20
    """All files of a sample together, bytes."""
    caption_chars: int = 100_000
    """A caption or a member of text, characters."""
    json_depth: int = 32
    """Brackets inside each other in a `.json` member."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how a sample is made of it."""

    train: tuple[SourceConfig | str, ...] = ()
    """The sources: addresses, or sections with `shards` and a weight (`vlmoe settings data.train`
    shows all)."""
    tokenizer: str = ""
    """SentencePiece model file."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Where captions are: `txt` is the .txt member, `json:NAME` a field of the .json member (a
    string or a list of strings, one of which is drawn)."""
    caption_weights: tuple[float, ...] = (1.0,)
    """How often each of `caption_keys` is used; one weight a key."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Changes made to training pictures."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Samples that are left out."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """What a sample may ask for at most."""
    shuffle_window: int = 256
    """Shards whose samples are shuffled together; shards themselves are always shuffled."""
    workers: int = 2
    """Loader processes of a rank; 0 reads in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker prepares ahead."""
    cache_dir: str = ""
    """Local folder for shards of a remote store, shared by the ranks of a node; empty means a
    folder of the run."""
    cache_gib: float = 500.0
    """Most of the node's disk that copies of shards may take, GiB; those unused longest go first. 0
    keeps no copies: every sample is one ranged request."""
    fetch_ahead: int = 8
    """Shards that a node copies before they are needed; 0 copies none and reads samples by
    ranges."""
    max_corrupt_ratio: float = 0.01
    """Stop when more than this share of the samples read (and at least 100) was bad."""
    request_seconds: float = 20.0
    """Longest wait for one request to a store (8 MiB at most) before it is tried again."""
    shard_seconds: float = 120.0
    """Longest time for one shard or sample of a store, all tries together; then its samples count
    as bad."""
    timeout_seconds: float = 300.0
    """Longest wait for one batch before the run stops with an error."""
    ledger: bool = False
    """Keep a record of the samples that every step got in `ledger/` of the run folder (8 bytes a
    sample)."""

    def __post_init__(self) -> None:
        require(
            len(self.caption_keys) == len(self.caption_weights),
            f"data.caption_weights has {len(self.caption_weights)} numbers for "
            f"{len(self.caption_keys)} data.caption_keys; give one weight a key",
        )
        require(self.workers >= 0, f"data.workers is {self.workers}, below 0")
        require(self.shuffle_window >= 1, f"data.shuffle_window is {self.shuffle_window}, below 1")
        for name in ("cache_gib", "fetch_ahead"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}, below 0")
        for name in ("request_seconds", "shard_seconds", "timeout_seconds"):
            require(
                getattr(self, name) > 0,
                f"data.{name} is {getattr(self, name)}, but must be positive",
            )
        require(
            self.shard_seconds < self.timeout_seconds,
            f"data.shard_seconds is {self.shard_seconds:g}, not below data.timeout_seconds "
            f"({self.timeout_seconds:g}): a batch would be given up before a shard is",
        )
        weighted = [
            bool(source.weight is not None or source.weight_schedule) for source in self.sources
        ]
        require(
            all(weighted) or not any(weighted),
            "data.train: some sources have a weight and others none; give all of them one, or none",
        )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`train` with every address as a section."""
        return as_sources(self.train)

    def without_secrets(self) -> DataConfig:
        """As it may be written down: addresses without the signatures of presigned queries."""
        return replace(
            self,
            train=tuple(
                without_secrets(entry) if isinstance(entry, str) else entry.without_secrets()
                for entry in self.train
            ),
        )


def as_sources(given: Sequence[SourceConfig | str]) -> tuple[SourceConfig, ...]:
    """Sources of which some may be mere addresses, as sections."""
    return tuple(SourceConfig(shards=entry) if isinstance(entry, str) else entry for entry in given)
