"""Settings of single samples: augmentation, filters, limits; part of `data` in a run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.common.problems import Problems

ImageMode = Literal["crop", "pad", "squash", "random_crop"]


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

    def problems(self) -> list[str]:
        """Invalid ranges."""
        found = Problems(self, "data.augment")
        found.within(0, 1, "brightness", "contrast", "saturation")
        found.within(0, 0.5, "hue")
        found.within(0, 180, "affine_degrees")
        for name in ("crop_scale", "crop_ratio", "affine_scale"):
            low, high = getattr(self, name)
            found.require(
                0 < low <= high,
                f"data.augment.{name} is [{low}, {high}], but must be two positive numbers in "
                f"ascending order",
            )
        found.require(
            self.crop_scale[1] <= 1,
            f"data.augment.crop_scale is {list(self.crop_scale)}, but must be at most 1, the whole "
            f"area",
        )
        found.require(
            0 <= self.affine_translate < 1,
            f"data.augment.affine_translate is {self.affine_translate}, but must be in 0..1, 1 "
            f"excluded",
        )
        return found.messages


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

    def problems(self) -> list[str]:
        """Invalid limits; conditions are checked where they are parsed."""
        found = Problems(self, "data.filters")
        found.at_least(0, "min_side", "max_aspect", "min_caption_chars", "max_caption_chars")
        found.require(
            not 0 < self.max_aspect < 1, f"data.filters.max_aspect is {self.max_aspect}, below 1"
        )
        return found.messages


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
