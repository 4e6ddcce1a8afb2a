"""Hands damaged and random samples to the code that reads them, in a process of its own.

    python -m tests.support.fuzz_content images FIRST_ROUND ROUNDS

Each round makes one input from its number alone. What comes of it must be an item or a DataError
with a slug; anything else ends the process with the round's number. Prints one line of JSON:
outcomes by kind, the slowest input in CPU seconds, and the most memory in MiB.
"""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.content.captions import Texts, clean, clean_hash
from data_pipeline.content.images import check_pixels, decode_pixels, read_header
from data_pipeline.content.transforms import eval_transform
from tests.support.pictures import picture_files

GIB = 1 << 30
PNG_SIGNATURE = 8


def main(what: str, first: int, rounds: int) -> None:
    """Run some rounds and report."""
    warnings.simplefilter("ignore")  # Pillow remarks on damaged tags
    attempt = {"images": images(), "captions": captions, "json": json_members}[what]
    for number in range(20):  # loads what is loaded on first use
        with contextlib.suppress(DataError):
            attempt(np.random.default_rng(number))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # So that a mistake ends this process and not its neighbors; what was used is measured below.
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, used + 2 * GIB))
    outcomes: Counter[str] = Counter()
    slowest = (0.0, -1)
    for number in range(first, first + rounds):
        start = time.process_time()
        try:
            outcomes[attempt(np.random.default_rng(number))] += 1
        except DataError as error:
            if not error.slug:
                raise
            assert len(str(error)) < 1000, str(error)[:2000]
            outcomes[error.slug] += 1
        except BaseException:
            print(f"round {number} of {what}", file=sys.stderr, flush=True)
            raise
        slowest = max(slowest, (time.process_time() - start, number))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "most_mib": most}))


def images() -> Callable[[np.random.Generator], str]:
    """Files of every kind, bytes changed, cut, lengthened or mixed."""
    files = list(picture_files().items())
    # Where mistakes are most interesting: whole headers, and what follows them.
    changes = [flip_early, flip_anywhere, cut, lengthen, large_number, splice]

    def attempt(rng: np.random.Generator) -> str:
        data = files[rng.integers(len(files))][1]
        for _ in range(rng.integers(1, 4)):
            other = files[rng.integers(len(files))][1]
            data = changes[rng.integers(len(changes))](rng, data, other)
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            data = with_checksums(data)
        header = read_header(data)
        check_pixels(header, 64 << 20)
        least = (8, 8) if rng.random() < 0.5 else None
        pixels, reduced = decode_pixels(data, header, least)
        assert pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4) and reduced in (1, 2, 4, 8)
        assert pixels.shape[:2] == (-(-header.height // reduced), -(-header.width // reduced))
        assert eval_transform(pixels, 16).shape == (3, 16, 16)
        return "good"

    return attempt


def flip_early(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Some of the first 512 bytes, others or only one bit."""
    return flipped(rng, data, min(512, len(data)))


def flip_anywhere(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Some bytes."""
    return flipped(rng, data, len(data))


def flipped(rng: np.random.Generator, data: bytes, end: int) -> bytes:
    changed = bytearray(data)
    for position in rng.integers(0, max(1, end), rng.integers(1, 8)) if data else ():
        changed[position] = (
            rng.integers(256) if rng.random() < 0.5 else changed[position] ^ 1 << rng.integers(8)
        )
    return bytes(changed)


def cut(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Its end, or a piece of it, is gone."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:end] if rng.random() < 0.5 else data[:start] + data[end:]


def lengthen(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """With random bytes, or some of its own once more."""
    place, count = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 600))
    more = rng.bytes(count) if rng.random() < 0.5 else data[place : place + count]
    return data[:place] + more + data[place:]


def large_number(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """A number as files have them for sizes and places, at its limits."""
    value = [0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF][rng.integers(8)]
    form = ["<I", ">I", "<H", ">H"][rng.integers(4)]
    number = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    place = int(rng.integers(0, max(1, min(len(data), 200))))
    return data[:place] + number + data[place + len(number) :]


def splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: rng.integers(0, len(data) + 1)] + other[rng.integers(0, len(other) + 1) :]


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are right, so that their contents are looked at."""
    fixed, position = bytearray(data), PNG_SIGNATURE
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def captions(rng: np.random.Generator) -> str:
    """Random bytes and characters of every category, a few or 10 MB of them."""
    length = int(
        rng.choice([0, 1, 10, 1000, 100_000, 10_000_000], p=[0.05, 0.2, 0.4, 0.25, 0.09, 0.01])
    )
    match rng.integers(4):
        case 0:
            data = rng.bytes(length)
        case 1:
            codes = rng.integers(0, 0x110000, length)
            data = "".join(map(chr, codes[:200_000].tolist())).encode("utf-8", "surrogatepass")
        case 2:  # a few characters over and over: what is quadratic shows
            few = [chr(code) for code in rng.choice(awkward(), 3)]
            data = ("".join(few) * (length // 3 + 1)).encode("utf-8", "surrogatepass")[:20_000_000]
        case _:
            data = bytes(rng.integers(32, 127, length, dtype=np.uint8))
    found = Texts({"txt": data}).find("txt")
    for caption in found:
        assert clean(caption) == caption and "\n" not in caption
        caption.encode()
        assert 0 <= clean_hash(caption) < 2**63
    return "good" if found else "empty"


def awkward() -> list[int]:
    """Code points that normalizing treats in an unusual way, and some of each category."""
    if not AWKWARD:
        seen: Counter[str] = Counter()
        for code in range(0x110000):
            category, char = unicodedata.category(chr(code)), chr(code)
            seen[category] += 1
            if (
                seen[category] < 20
                or unicodedata.combining(char)
                or len(unicodedata.normalize("NFD", char)) > 3
            ):
                AWKWARD.append(code)
    return AWKWARD


AWKWARD: list[int] = []


def json_members(rng: np.random.Generator) -> str:
    """JSON of every shape, damaged, deep or long."""
    data = json.dumps(
        {"caption": value(rng, int(rng.integers(1, 7))), "more": ["a", 1, None]}
    ).encode()
    match rng.integers(6):
        case 0:
            data = flip_anywhere(rng, data, b"")
        case 1:
            data = cut(rng, data, b"")
        case 2:
            data = lengthen(rng, data, b"")
        case 3:
            piece = [b"[", b'{"a":', b"[{", b"1", b'"', b"\\", b"[],", b"-", b"1e9", b'"\\ud800",'][
                rng.integers(10)
            ]
            count = int(10 ** rng.uniform(0, 6.3))
            data = (
                data[: rng.integers(len(data))] + piece * count + data[-int(rng.integers(1, 9)) :]
            )
        case 4:
            data = rng.bytes(int(rng.integers(0, 200)))
    texts = Texts({"json": data})
    found = texts.find("json:caption") + texts.find("json:more")
    return "good" if found else "empty"


def value(rng: np.random.Generator, room: int) -> object:
    """Something that JSON can hold."""
    match rng.integers(6 if room else 4):
        case 0:
            return "".join(map(chr, rng.integers(0, 0x3000, 8).tolist()))
        case 1:
            return float(rng.normal()) * 10.0 ** int(rng.integers(-300, 300))
        case 2:
            return [None, True, False, 7][rng.integers(4)]
        case 3:
            return "a caption"
        case 4:
            return [value(rng, room - 1) for _ in range(rng.integers(5))]
        case _:
            return {str(index): value(rng, room - 1) for index in range(rng.integers(5))}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
