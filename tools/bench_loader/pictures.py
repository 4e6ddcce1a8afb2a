"""Synthetic pictures that cost a decoder what photographs cost, and captions of usual length.

A picture is 1/f noise (clouds at every scale), a few shapes with hard edges, and a little grain:
then the JPEG files have the sizes of real ones at the same quality. Everything follows from a seed,
so that the same version of the libraries gives the same bytes anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg

WORDS = (
    "a the of on in with and near under red green blue white dark bright old young small large wooden stone "
    "man woman child dog cat bird horse car train boat house street river mountain forest beach garden table "
    "chair window door bottle flower tree cloud sunset night morning winter summer standing sitting walking "
    "running holding looking eating playing photo drawing view closeup portrait background group people city"
).split()


def caption(seed: int) -> str:
    """A caption of 6 to 16 words that (nearly) no other seed has."""
    draw = np.random.default_rng([seed, 1])
    words = draw.choice(len(WORDS), size=int(draw.integers(5, 16)))
    return " ".join([*(WORDS[word] for word in words), str(seed)])


def pixels(seed: int, width: int, height: int, *, grain: float = 4.0) -> np.ndarray:
    """A picture: uint8 RGB `[height, width, 3]`.

    Args:
        seed: Which one.
        width: Pixels.
        height: Pixels.
        grain: Standard deviation of the noise of single pixels, in gray levels.
    """
    draw = np.random.default_rng([seed, 0])
    image = np.full((height, width, 3), draw.uniform(60, 190, size=3), np.float32)
    cells, strength = 2, 45.0
    while cells < max(width, height):
        # Color changes slowly in photographs; what is fine is mostly a matter of brightness.
        channels = 3 if cells <= 8 else 1
        noise = draw.standard_normal(
            (cells * height // width + 2, cells + 2, channels), dtype=np.float32
        )
        layer = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image += strength * layer.reshape(height, width, channels)
        cells, strength = cells * 2, strength / 1.65
    for _ in range(int(draw.integers(3, 9))):
        corners = draw.uniform(-0.1, 1.1, size=(int(draw.integers(3, 7)), 2)) * (width, height)
        shade = np.zeros((height, width), np.uint8)
        cv2.fillPoly(shade, [corners.astype(np.int32)], 1)
        image[shade == 1] += draw.uniform(-70, 70, size=3).astype(np.float32)
    image += grain * draw.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(seed: int, width: int, height: int, *, quality: int, grain: float) -> bytes:
    """The picture as a JPEG file with the usual halved color resolution."""
    data: bytes = simplejpeg.encode_jpeg(
        pixels(seed, width, height, grain=grain),
        quality=quality,
        colorspace="RGB",
        colorsubsampling="420",
    )
    return data


def samples(
    count: int, sides: tuple[tuple[int, int], ...], *, quality: int, grain: float, first: int = 0
) -> Iterator[dict[str, object]]:
    """WebDataset samples whose pictures take turns in their width and height (`sides`)."""
    for number in range(first, first + count):
        width, height = sides[number % len(sides)]
        yield {
            "__key__": f"{number:08d}",
            "jpg": jpeg(number, width, height, quality=quality, grain=grain),
            "txt": caption(number),
        }
