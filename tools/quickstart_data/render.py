"""Renders drawings, SVGs or large images, as small square WebP files with transparency.

WebP is lossless here: at this size it needs half the space of PNG and half its decoding time. Fully
transparent pixels lose their color, so readers must composite before resampling, as `transforms`
does.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import Progress
from data_pipeline.common.tables import counted
from tools.quickstart_data import chunk_store
from tools.quickstart_data.collect import Drawing

logger = logging.getLogger(__name__)

SIDE = 64
"""Side of the images, pixels: a third more than the quickstart's 48, for rotation and zoom."""
VERSION = 1
"""Increment when the same drawing gives different bytes."""
CHUNK = 600
"""Drawings that are rendered and stored as a unit; about a second of work."""
LOSSLESS = 101
"""OpenCV's WebP quality for lossless compression: anything above 100."""


def render_all(
    drawings: Sequence[Drawing], folder: Path, *, processes: int = 0
) -> dict[str, bytes]:
    """Render all drawings; chunks that an interrupted call stored in `folder` are reused.

    Args:
        drawings: Drawings with unique keys.
        folder: Folder of rendered chunks, kept until the data set is complete.
        processes: Number of processes; 0 means one per core, at most 8.

    Returns:
        WebP bytes by key. Drawings without visible pixels are excluded and logged.

    Raises:
        DataError: A drawing cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [drawings[start : start + CHUNK] for start in range(0, len(drawings), CHUNK)]
    paths = [folder / f"{_chunk_name(chunk)}.npz" for chunk in chunks]
    rendered: dict[int, dict[str, bytes]] = {}
    for index, path in enumerate(paths):
        if (stored := chunk_store.load(path)) is not None:
            rendered[index] = stored

    pending = [index for index in range(len(chunks)) if index not in rendered]
    done = sum(len(chunks[index]) for index in rendered)
    if pending:
        with Progress("rendering", len(drawings), "images", done=done) as progress:
            results = _render_chunks([chunks[index] for index in pending], processes, progress)
            for index, images_of_chunk in zip(pending, results, strict=True):
                chunk_store.save(paths[index], images_of_chunk)
                rendered[index] = images_of_chunk

    images: dict[str, bytes] = {}
    for index in range(len(chunks)):
        images |= {key: data for key, data in rendered[index].items() if data}
    if blank := [drawing.key for drawing in drawings if drawing.key not in images]:
        logger.warning(
            "excluded %s without visible pixels: %s",
            counted(len(blank), "drawing"),
            ", ".join(blank),
        )
    return images


def render(data: str | bytes) -> bytes:
    """One drawing as WebP, `SIDE` pixels square with its aspect ratio; empty if it is invisible.

    Raises:
        ValueError: `data` is neither a valid SVG nor a valid image.
    """
    if isinstance(data, str):
        data = _rasterize(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError("the image cannot be decoded")
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    if image.shape[:2] != (SIDE, SIDE):
        image = _resize(image)
    if not image[..., 3].any():
        return b""
    ok, encoded = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, LOSSLESS])
    if not ok:
        raise ValueError("this build of OpenCV cannot write WebP")
    return bytes(encoded)


def _rasterize(svg: str) -> bytes:
    import resvg_py  # a dependency of this tool only

    # System fonts differ between machines.
    return bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    )


def _resize(image: np.ndarray) -> np.ndarray:
    """Fit uint8 `[h, w, 4]` into `[SIDE, SIDE, 4]`, with colors weighted by alpha."""
    alpha = image[..., 3:].astype(np.float32) / 255
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    # Without the weight, the undefined color of transparent pixels appears as a dark edge.
    weighted = cv2.resize(image[..., :3] * alpha, size, interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)[..., None]
    colors = np.divide(weighted, alpha, out=np.zeros_like(weighted), where=alpha > 0)
    small = np.concatenate([colors, alpha * 255], axis=-1).round().clip(0, 255).astype(np.uint8)

    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    right, bottom = SIDE - size[0] - left, SIDE - size[1] - top
    square: np.ndarray = cv2.copyMakeBorder(
        small, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0)
    )
    return square


def _render_chunk(chunk: Sequence[tuple[str, str | bytes]]) -> dict[str, bytes]:
    cv2.setNumThreads(1)  # the pool already uses all cores
    images: dict[str, bytes] = {}
    for key, data in chunk:
        try:
            images[key] = render(data)
        except ValueError as error:
            raise DataError(f"cannot render {key}: {error}") from error
    return images


def _render_chunks(
    chunks: Sequence[Sequence[Drawing]], processes: int, progress: Progress
) -> Iterator[dict[str, bytes]]:
    """Images of each chunk, in order; in this process if one is enough."""
    inputs = [[(drawing.key, drawing.data) for drawing in chunk] for chunk in chunks]
    processes = min(processes or min(os.cpu_count() or 1, 8), len(inputs))
    if processes <= 1:
        for chunk in inputs:
            images = _render_chunk(chunk)
            progress.update(len(images))
            yield images
        return
    # Not fork: threads that OpenCV may have started do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_exit_with_parent) as pool:
        for images in pool.map(_render_chunk, inputs):
            progress.update(len(images))
            yield images


def _exit_with_parent() -> None:
    """In a worker: exit when the parent is killed; the worker would wait forever otherwise."""
    if (parent := multiprocessing.parent_process()) is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _chunk_name(chunk: Sequence[Drawing]) -> str:
    """A hash of the chunk's contents."""
    digest = hashlib.blake2b(f"{VERSION} {SIDE}".encode(), digest_size=12)
    for drawing in chunk:
        data = drawing.data.encode() if isinstance(drawing.data, str) else drawing.data
        for part in (drawing.key.encode(), data):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
