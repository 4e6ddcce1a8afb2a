"""Draws: SVG or a large picture in, a small square WebP with its transparency out.

Lossless WebP: at this size it is half of PNG and decodes in half the time. Fully transparent pixels
keep no colour, which is why readers must composite before they resample (`transforms` does).
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import Progress
from tools.quickstart_data.collect import Drawing

logger = logging.getLogger(__name__)

SIDE = 64
"""Side of the pictures, pixels: a third more than the quickstart's 48, to turn and zoom in."""
VERSION = 1
"""Change it when the same drawing would give other bytes."""
CHUNK = 600
"""Drawings that are rendered, stored and resumed together; a second of work."""


def render_all(
    drawings: Sequence[Drawing], folder: Path, *, processes: int = 0
) -> dict[str, bytes]:
    """Render every drawing; what an earlier, interrupted call has rendered is taken from `folder`.

    Args:
        drawings: What to draw; keys are unique.
        folder: Where finished chunks are kept until the whole set is built.
        processes: How many work at once; 0 means one a core, at most 8.

    Returns:
        WebP bytes by key. A drawing of which nothing can be seen is left out and named in the log.

    Raises:
        DataError: A drawing cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [drawings[start : start + CHUNK] for start in range(0, len(drawings), CHUNK)]
    paths = [folder / f"{_chunk_name(chunk)}.npz" for chunk in chunks]
    found = {
        index: rendered for index, path in enumerate(paths) if (rendered := _load(path)) is not None
    }
    to_do = [index for index in range(len(chunks)) if index not in found]
    done = sum(len(chunks[index]) for index in found)
    if to_do:
        with Progress("rendering", len(drawings), "pictures", done=done) as progress:
            for index, rendered in _map(
                [chunks[index] for index in to_do], to_do, processes, progress
            ):
                _store(paths[index], rendered)
                found[index] = rendered
    pictures = {
        key: data for index in range(len(chunks)) for key, data in found[index].items() if data
    }
    if blank := [drawing.key for drawing in drawings if drawing.key not in pictures]:
        logger.warning(
            "left out %d drawings of which nothing can be seen: %s", len(blank), ", ".join(blank)
        )
    return pictures


def render(picture: str | bytes) -> bytes:
    """One picture as WebP, `SIDE` pixels square, its shape kept; empty if nothing can be seen.

    Raises:
        ValueError: It is neither a readable SVG nor a readable picture.
    """
    if isinstance(picture, str):
        import resvg_py  # only this tool needs it, and only here

        # Without fonts of this machine: the same bytes everywhere.
        picture = bytes(
            resvg_py.svg_to_bytes(
                svg_string=picture, width=SIDE, height=SIDE, skip_system_fonts=True
            )
        )
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError("not a picture that can be read")
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    if image.shape[:2] != (SIDE, SIDE):
        image = _shrink(image)
    if not image[..., 3].any():
        return b""
    # A quality above 100 is how OpenCV spells lossless.
    ok, data = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])
    if not ok:
        raise ValueError("OpenCV cannot write WebP here")
    return bytes(data)


def _shrink(image: np.ndarray) -> np.ndarray:
    """Resize, uint8 `[h, w, 4]` to `[SIDE, SIDE, 4]`, colours weighted by how much of them is
    seen."""
    alpha = image[..., 3:].astype(np.float32) / 255
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    # Without the weight, the colour that nobody chose of see-through pixels leaks in as a dark rim.
    seen = cv2.resize(image[..., :3] * alpha, size, interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)[..., None]
    colours = np.divide(seen, alpha, out=np.zeros_like(seen), where=alpha > 0)
    small = np.concatenate([colours, alpha * 255], axis=-1).round().clip(0, 255).astype(np.uint8)
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    right, bottom = SIDE - size[0] - left, SIDE - size[1] - top
    square: np.ndarray = cv2.copyMakeBorder(
        small, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(0, 0, 0, 0)
    )
    return square


def _render_chunk(chunk: Sequence[tuple[str, str | bytes]]) -> dict[str, bytes]:
    cv2.setNumThreads(1)  # the pool already uses every core
    rendered = {}
    for key, picture in chunk:
        try:
            rendered[key] = render(picture)
        except ValueError as error:
            raise DataError(f"cannot draw {key}: {error}") from error
    return rendered


def _map(
    chunks: Sequence[Sequence[Drawing]], numbers: Sequence[int], processes: int, progress: Progress
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Each chunk's number and pictures, in order; in other processes unless one is enough."""
    plain = [[(drawing.key, drawing.picture) for drawing in chunk] for chunk in chunks]
    processes = min(processes or min(os.cpu_count() or 1, 8), len(plain))
    if processes <= 1:
        for number, chunk in zip(numbers, plain, strict=True):
            rendered = _render_chunk(chunk)
            progress.update(len(chunk))
            yield number, rendered
        return
    # Not fork: threads that OpenCV may have started do not survive it.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_end_with_parent) as pool:
        for number, rendered in zip(numbers, pool.map(_render_chunk, plain), strict=True):
            progress.update(len(rendered))
            yield number, rendered


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is killed; it would wait for ever
    otherwise."""
    if (parent := multiprocessing.parent_process()) is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _chunk_name(chunk: Sequence[Drawing]) -> str:
    digest = hashlib.blake2b(f"{VERSION} {SIDE}".encode(), digest_size=12)
    for drawing in chunk:
        data = drawing.picture.encode() if isinstance(drawing.picture, str) else drawing.picture
        for part in (drawing.key.encode(), data):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _store(path: Path, rendered: dict[str, bytes]) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    with aside.open("wb") as file:
        np.savez(
            file,
            keys=np.array(list(rendered)),
            sizes=np.array([len(data) for data in rendered.values()], np.int64),
            data=np.frombuffer(b"".join(rendered.values()), np.uint8),
        )
    os.replace(aside, path)


def _load(path: Path) -> dict[str, bytes] | None:
    """A stored chunk, or None where there is none that is whole."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys, sizes, data = (stored[name] for name in ("keys", "sizes", "data"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(sizes)
    raw = data.tobytes()
    return {
        str(key): raw[end - size : end] for key, size, end in zip(keys, sizes, ends, strict=True)
    }
