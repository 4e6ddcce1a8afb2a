"""Synthetic images that cost a decoder as much as photographs, with captions of typical length.

An image is 1/f noise (structure at every scale), a few shapes with hard edges, and a little grain:
the JPEG files then have the sizes of real photographs at the same quality. Images depend only on
their seed: the same library versions give the same bytes on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import simplejpeg

WORDS = (
    "a the of on in with and near under red green blue white dark bright old young small large "
    "wooden stone man woman child dog cat bird horse car train boat house street river mountain "
    "forest beach garden table chair window door bottle flower tree cloud sunset night morning "
    "winter summer standing sitting walking running holding looking eating playing photo drawing "
    "view closeup portrait background group people city"
).split()


def caption(seed: int) -> str:
    """A caption of 6 to 16 words, distinct for (nearly) every seed."""
    rng = np.random.default_rng([seed, 1])
    words = rng.choice(len(WORDS), size=int(rng.integers(5, 16)))
    return " ".join([*(WORDS[word] for word in words), str(seed)])


def pixels(seed: int, width: int, height: int, *, grain: float = 4.0) -> np.ndarray:
    """Generate an image: uint8 RGB `[height, width, 3]`.

    Args:
        seed: Selects the image.
        width: Pixels.
        height: Pixels.
        grain: Standard deviation of the per-pixel noise, in gray levels.
    """
    rng = np.random.default_rng([seed, 0])
    image = np.full((height, width, 3), rng.uniform(60, 190, size=3), np.float32)
    cells, strength = 2, 45.0
    while cells < max(width, height):
        # In photographs color varies slowly; fine detail is mostly brightness.
        channels = 3 if cells <= 8 else 1
        noise_shape = (cells * height // width + 2, cells + 2, channels)
        noise = rng.standard_normal(noise_shape, dtype=np.float32)
        layer = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image += strength * layer.reshape(height, width, channels)
        cells, strength = cells * 2, strength / 1.65

    for _ in range(int(rng.integers(3, 9))):
        corners = rng.uniform(-0.1, 1.1, size=(int(rng.integers(3, 7)), 2)) * (width, height)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
        image[mask == 1] += rng.uniform(-70, 70, size=3).astype(np.float32)

    image += grain * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(seed: int, width: int, height: int, *, quality: int, grain: float) -> bytes:
    """The image as a JPEG file with 4:2:0 chroma subsampling."""
    data: bytes = simplejpeg.encode_jpeg(
        pixels(seed, width, height, grain=grain),
        quality=quality,
        colorspace="RGB",
        colorsubsampling="420",
    )
    return data


def samples(
    count: int, sizes: Sequence[tuple[int, int]], *, quality: int, grain: float, first: int = 0
) -> Iterator[dict[str, object]]:
    """WebDataset samples whose images cycle through `sizes` (width, height)."""
    for index in range(first, first + count):
        width, height = sizes[index % len(sizes)]
        image = jpeg(index, width, height, quality=quality, grain=grain)
        yield {"__key__": f"{index:08d}", "jpg": image, "txt": caption(index)}


def repeated_samples(images: Sequence[bytes], count: int) -> Iterator[dict[str, object]]:
    """WebDataset samples with distinct keys and captions that cycle through a few images."""
    for index in range(count):
        image = images[index % len(images)]
        yield {"__key__": f"{index:08d}", "jpg": image, "txt": caption(index)}
