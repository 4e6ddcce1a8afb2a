"""Samples that try to run code, to write files, or to exhaust memory."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251 - to create what must never be unpickled
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.images import encode_image, image_bombs, synthetic_photo

JPEG = encode_image(synthetic_photo(64, 80), "JPEG")
CAPTION = b"a caption"


class MaliciousSample(NamedTuple):
    """A sample and the expected result of reading it."""

    result: str
    """`good`, or the reason why it is corrupt."""
    files: dict[str, bytes]
    """Contents by extension."""


class _PicklePayload:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch '{self.canary}'",)


def malicious_samples(canary: Path) -> dict[str, MaliciousSample]:
    """Malicious samples by key; `canary` exists afterwards if one of them could run code."""
    return {
        **_pickles(canary),
        **_code_and_paths(canary),
        **_long_texts(),
        **_image_bombs(),
    }


def _pickles(canary: Path) -> dict[str, MaliciousSample]:
    payload = pickle.dumps(_PicklePayload(canary))
    protocol_4 = pickle.dumps(_PicklePayload(canary), protocol=4)
    buffer = io.BytesIO()
    np.save(buffer, np.array([_PicklePayload(canary)], dtype=object), allow_pickle=True)
    array = buffer.getvalue()

    pickles = dict.fromkeys(("pkl", "pickle", "pyd", "pth", "pt", "cls"), payload)
    arrays = {"npy": array, "npz": array, "sh": b"touch canary\n"}
    pair = {"jpg": JPEG, "txt": CAPTION}
    return {
        "pickles": MaliciousSample("good", pair | pickles),
        "arrays": MaliciousSample("good", pair | arrays),
        "only-pickles": MaliciousSample(
            "no-image", {"pkl": payload, "pyd": payload, "txt": CAPTION}
        ),
        "pickled-image": MaliciousSample("corrupt-image", {"jpg": payload, "txt": CAPTION}),
        "pickled-caption": MaliciousSample("invalid-text", {"jpg": JPEG, "txt": protocol_4}),
        "pickled-json": MaliciousSample("invalid-text", {"jpg": JPEG, "json": protocol_4}),
    }


def _code_and_paths(canary: Path) -> dict[str, MaliciousSample]:
    yaml = b"!!python/object/apply:os.system ['touch canary']"
    code = f"__import__('os').system('touch {canary}')".encode()
    pair = {"jpg": JPEG, "txt": CAPTION}
    keys = ("pipe:touch canary", "../../evil", "../shards/manifest", str(canary))
    return {
        "yaml-in-json": MaliciousSample("invalid-json", {"jpg": JPEG, "json": yaml}),
        "code-as-caption": MaliciousSample("good", {"jpg": JPEG, "txt": code}),
        **{key: MaliciousSample("good", pair) for key in keys},
    }


def _long_texts() -> dict[str, MaliciousSample]:
    texts = {
        "deep-json": b'{"caption":' * 800_000,
        "open-json": b"[" * 10_000_000,
        "digits": b'{"caption": ' + b"1" * 3_000_000 + b"}",
    }
    accents = ("e" + "\u0301\u0323" * 49_000).encode()
    return {
        "long-caption": MaliciousSample(
            "caption-too-long", {"jpg": JPEG, "txt": b"x" * 10_000_000}
        ),
        "accents": MaliciousSample("good", {"jpg": JPEG, "txt": accents}),
        **{
            key: MaliciousSample("invalid-json", {"jpg": JPEG, "json": text})
            for key, text in texts.items()
        },
    }


def _image_bombs() -> dict[str, MaliciousSample]:
    samples = {}
    for name, data in image_bombs().items():
        extension = name.rpartition(".")[2]
        samples[f"bomb-{name.replace('.', '-')}"] = MaliciousSample(
            "corrupt-image", {extension: data, "txt": CAPTION}
        )
    return samples
