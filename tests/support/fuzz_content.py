"""Fuzzer for the sample decoders, run as a child process by test_image_fuzz.py.

    python -m tests.support.fuzz_content images FIRST_SEED COUNT

Each input is generated from its seed. It must either be accepted or raise a DataError with a slug;
any other exception ends the process and prints the seed. Prints one JSON line: inputs by outcome,
the CPU seconds and seed of the slowest input, and the peak memory in MiB.
"""

from __future__ import annotations

import contextlib
import functools
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
from data_pipeline.content.captions import SampleTexts, clean_caption, hash_clean_caption
from data_pipeline.content.image import check_pixels, eval_transform, read_header
from data_pipeline.content.image.decoding import decode_pixels
from tests.support.images import sample_image_files

GIB = 1 << 30
PNG_SIGNATURE_BYTES = 8


def main(target: str, first_seed: int, count: int) -> None:
    """Process `count` inputs and print the report."""
    warnings.simplefilter("ignore")  # Pillow warns of corrupt tags
    run = {"images": image_target(), "captions": fuzz_captions, "json": fuzz_json}[target]
    for seed in range(20):  # warm-up: imports and lazily allocated memory
        with contextlib.suppress(DataError):
            run(np.random.default_rng(seed))

    # A limit, so that excessive allocation fails in this process instead of exhausting the machine.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, used + 2 * GIB))

    outcomes: Counter[str] = Counter()
    slowest = (0.0, -1)
    for seed in range(first_seed, first_seed + count):
        start = time.process_time()
        try:
            outcomes[run(np.random.default_rng(seed))] += 1
        except DataError as error:
            if not error.slug:
                raise
            assert len(str(error)) < 1000, str(error)[:2000]
            outcomes[error.slug] += 1
        except BaseException:
            print(f"seed {seed} of {target}", file=sys.stderr, flush=True)
            raise
        slowest = max(slowest, (time.process_time() - start, seed))

    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "peak_mib": peak_mib}))


def image_target() -> Callable[[np.random.Generator], str]:
    """A function that decodes an image file of a random format after one to three mutations."""
    files = list(sample_image_files().items())
    mutations = [corrupt_header, corrupt_anywhere, cut, insert, overwrite_integer, splice]

    def run(rng: np.random.Generator) -> str:
        data = files[rng.integers(len(files))][1]
        for _ in range(rng.integers(1, 4)):
            other = files[rng.integers(len(files))][1]
            data = mutations[rng.integers(len(mutations))](rng, data, other)
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            data = with_valid_checksums(data)

        header = read_header(data)
        check_pixels(header, 64 << 20)
        min_size = (8, 8) if rng.random() < 0.5 else None
        pixels, reduction = decode_pixels(data, header, min_size)
        assert pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4)
        assert reduction in (1, 2, 4, 8)
        assert pixels.shape[:2] == (-(-header.height // reduction), -(-header.width // reduction))
        assert eval_transform(pixels, 16).shape == (3, 16, 16)
        return "accepted"

    return run


def corrupt_header(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Change a few of the first 512 bytes, where headers are."""
    return corrupted(rng, data, min(512, len(data)))


def corrupt_anywhere(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Change a few bytes."""
    return corrupted(rng, data, len(data))


def corrupted(rng: np.random.Generator, data: bytes, end: int) -> bytes:
    """Replace a few of the first `end` bytes, or flip a bit in them."""
    changed = bytearray(data)
    for position in rng.integers(0, max(1, end), rng.integers(1, 8)) if data else ():
        changed[position] = (
            rng.integers(256) if rng.random() < 0.5 else changed[position] ^ 1 << rng.integers(8)
        )
    return bytes(changed)


def cut(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Remove the end or a part in the middle."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:end] if rng.random() < 0.5 else data[:start] + data[end:]


def insert(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Insert random bytes, or duplicate a part."""
    position, count = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 600))
    inserted = rng.bytes(count) if rng.random() < 0.5 else data[position : position + count]
    return data[:position] + inserted + data[position:]


def overwrite_integer(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Write an integer at the limits of its range, as files have for sizes and offsets."""
    value = [0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF][rng.integers(8)]
    form = ["<I", ">I", "<H", ">H"][rng.integers(4)]
    packed = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    position = int(rng.integers(0, max(1, min(len(data), 200))))
    return data[:position] + packed + data[position + len(packed) :]


def splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: rng.integers(0, len(data) + 1)] + other[rng.integers(0, len(other) + 1) :]


def with_valid_checksums(data: bytes) -> bytes:
    """A PNG with recomputed checksums, so that corrupt chunks reach the decoder."""
    fixed, position = bytearray(data), PNG_SIGNATURE_BYTES
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def fuzz_captions(rng: np.random.Generator) -> str:
    """Read a caption of random bytes, or of characters of any category, up to 10 MB."""
    length = int(
        rng.choice([0, 1, 10, 1000, 100_000, 10_000_000], p=[0.05, 0.2, 0.4, 0.25, 0.09, 0.01])
    )
    match rng.integers(4):
        case 0:
            data = rng.bytes(length)
        case 1:
            codes = rng.integers(0, 0x110000, length)
            data = "".join(map(chr, codes[:200_000].tolist())).encode("utf-8", "surrogatepass")
        case 2:  # repeats a few characters, which exposes quadratic run time
            few = [chr(code) for code in rng.choice(unusual_code_points(), 3)]
            data = ("".join(few) * (length // 3 + 1)).encode("utf-8", "surrogatepass")[:20_000_000]
        case _:
            data = bytes(rng.integers(32, 127, length, dtype=np.uint8))

    captions = SampleTexts({"txt": data}).find_captions("txt")
    for caption in captions:
        assert clean_caption(caption) == caption and "\n" not in caption
        caption.encode()
        assert 0 <= hash_clean_caption(caption) < 2**63
    return "accepted" if captions else "empty"


@functools.cache
def unusual_code_points() -> list[int]:
    """Code points that Unicode normalization treats specially, and some of each category."""
    code_points = []
    seen: Counter[str] = Counter()
    for code in range(0x110000):
        category, char = unicodedata.category(chr(code)), chr(code)
        seen[category] += 1
        if (
            seen[category] < 20
            or unicodedata.combining(char)
            or len(unicodedata.normalize("NFD", char)) > 3
        ):
            code_points.append(code)
    return code_points


def fuzz_json(rng: np.random.Generator) -> str:
    """Read captions from JSON of random structure: valid, corrupt, deeply nested or long."""
    fields = {"caption": random_value(rng, int(rng.integers(1, 7))), "more": ["a", 1, None]}
    data = json.dumps(fields).encode()
    match rng.integers(6):
        case 0:
            data = corrupt_anywhere(rng, data, b"")
        case 1:
            data = cut(rng, data, b"")
        case 2:
            data = insert(rng, data, b"")
        case 3:
            tokens = [b"[", b'{"a":', b"[{", b"1", b'"', b"\\", b"[],", b"-", b"1e9", b'"\\ud800",']
            token = tokens[rng.integers(10)]
            count = int(10 ** rng.uniform(0, 6.3))
            head = data[: rng.integers(len(data))]
            data = head + token * count + data[-int(rng.integers(1, 9)) :]
        case 4:
            data = rng.bytes(int(rng.integers(0, 200)))

    texts = SampleTexts({"json": data})
    captions = texts.find_captions("json:caption") + texts.find_captions("json:more")
    return "accepted" if captions else "empty"


def random_value(rng: np.random.Generator, max_depth: int) -> object:
    """A random JSON value."""
    match rng.integers(6 if max_depth else 4):
        case 0:
            return "".join(map(chr, rng.integers(0, 0x3000, 8).tolist()))
        case 1:
            return float(rng.normal()) * 10.0 ** int(rng.integers(-300, 300))
        case 2:
            return [None, True, False, 7][rng.integers(4)]
        case 3:
            return "a caption"
        case 4:
            return [random_value(rng, max_depth - 1) for _ in range(rng.integers(5))]
        case _:
            num_fields = rng.integers(5)
            return {str(index): random_value(rng, max_depth - 1) for index in range(num_fields)}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
