"""Whole datasets made to run programs, to write elsewhere or to use up the machine, through the
commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle  # noqa: TID251 - to make what must never be read
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import VlmError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import load_manifest
from tests.support.launch import ROOT, clean_environment
from tests.support.pictures import encoded, photo, picture_bombs
from tests.support.small_shards import make_tokenizer, settings

pytestmark = pytest.mark.e2e

MIB = 1024
"""Most memory of a process that reads them."""
JPEG = encoded(photo(64, 80), "JPEG")


class Bait:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    """A folder with `shards/` and a tokenizer; nothing else may appear in it."""
    (tmp_path / "shards").mkdir()
    make_tokenizer(tmp_path)
    return tmp_path


def run(yard: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in the yard."""
    env = clean_environment({"PYTHONPATH": str(ROOT)})
    return subprocess.run(
        [sys.executable, *words],
        cwd=yard,
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
        errors="replace",
    )


def data_command(yard: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(yard, "-m", "data_pipeline", *words)


def read_everything(yard: Path) -> dict[str, Any]:
    """What evaluation and training make of `shards/`; see `tests/support/read_everything.py`."""
    done = run(yard, "-m", "tests.support.read_everything", "shards", "tokenizer.model")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def samples(canary: Path) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Samples by key: what must become of them, and their files."""
    bait = pickle.dumps(Bait(canary))
    array = io.BytesIO()
    np.save(array, np.array([Bait(canary)], dtype=object), allow_pickle=True)
    text = b"a caption"
    good = {"jpg": JPEG, "txt": text}
    traps = {
        "pickles": (
            "good",
            good | dict.fromkeys(("pkl", "pickle", "pyd", "pth", "pt", "cls"), bait),
        ),
        "arrays": (
            "good",
            good | {"npy": array.getvalue(), "npz": array.getvalue(), "sh": b"touch canary\n"},
        ),
        "only-pickles": ("no-image", {"pkl": bait, "pyd": bait, "txt": text}),
        "pickled-picture": ("bad-image", {"jpg": bait, "txt": text}),
        "pickled-caption": (
            "bad-text",
            {"jpg": JPEG, "txt": pickle.dumps(Bait(canary), protocol=4)},
        ),
        "pickled-json": ("bad-text", {"jpg": JPEG, "json": pickle.dumps(Bait(canary), protocol=4)}),
        "yaml-in-json": (
            "bad-json",
            {"jpg": JPEG, "json": b"!!python/object/apply:os.system ['touch canary']"},
        ),
        "code-as-caption": (
            "good",
            {"jpg": JPEG, "txt": f"__import__('os').system('touch {canary}')".encode()},
        ),
        "pipe:touch canary": ("good", good),
        "../../evil": ("good", good),
        "../shards/manifest": ("good", good),
        str(canary): ("good", good),
        "long-caption": ("caption-too-long", {"jpg": JPEG, "txt": b"x" * 10_000_000}),
        "deep-json": ("bad-json", {"jpg": JPEG, "json": b'{"caption":' * 800_000}),
        "open-json": ("bad-json", {"jpg": JPEG, "json": b"[" * 10_000_000}),
        "digits": ("bad-json", {"jpg": JPEG, "json": b'{"caption": ' + b"1" * 3_000_000 + b"}"}),
        "accents": ("good", {"jpg": JPEG, "txt": ("e" + "\u0301\u0323" * 49_000).encode()}),
    }
    for name, data in picture_bombs().items():
        traps[f"bomb-{name.replace('.', '-')}"] = (
            "bad-image",
            {name.rpartition(".")[2]: data, "txt": text},
        )
    return traps


def test_nothing_in_a_shard_is_run_or_written_and_everything_is_counted(yard: Path) -> None:
    canary = yard / "canary"
    traps = samples(canary)
    members = [
        (f"{key}.{name}", data)
        for key, (_, files) in sorted(traps.items())
        for name, data in files.items()
    ]
    write_tar(yard / "shards" / "a.tar", members)
    before = files_below(yard.parent)

    indexed = data_command(yard, "index", "shards")
    assert indexed.returncode == 0, indexed.stderr
    assert load_manifest(str(yard / "shards")).total_samples == len(traps)
    report = read_everything(yard)

    expected: dict[str, int] = {}
    for outcome, _ in traps.values():
        expected[outcome] = expected.get(outcome, 0) + 1
    assert report["evaluation"] == report["training"] == expected
    assert report["most_mib"] < MIB
    assert not canary.exists()
    new = files_below(yard.parent) - before
    assert new == {f"{yard.name}/shards/{name}" for name in ("manifest.json", "a.tar.index")}


def test_other_tools_of_the_pipeline_neither_run_nor_write_anything(yard: Path) -> None:
    canary = yard / "canary"
    write_tar(
        yard / "shards" / "a.tar",
        [
            (f"{key}.{name}", data)
            for key, (_, files) in sorted(samples(canary).items())
            for name, data in files.items()
        ],
    )
    index_shards(str(yard / "shards"), workers=0)
    before = files_below(yard.parent)
    for words in (
        ("check", "shards"),
        ("stats", "shards"),
        ("peek", "shards"),
        ("filter", "shards", "--min-side", "10"),
    ):
        done = data_command(yard, *words)
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, (
            words,
            done.stderr[-2000:],
        )
        assert "\x1b" not in done.stdout + done.stderr
    assert not canary.exists()
    assert files_below(yard.parent) == before


def test_links_and_devices_are_never_followed(yard: Path) -> None:
    secret = yard / "secret.txt"
    secret.write_text("a password")
    kinds = ("SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE")
    for kind in kinds:
        with tarfile.open(yard / "shards" / f"{kind}.tar", "w") as tar:
            for name, data in (
                ("a.jpg", JPEG),
                ("a.txt", b"good"),
                ("b.txt", None),
                ("b.jpg", JPEG),
            ):
                member = tarfile.TarInfo(name)
                if data is None:
                    member.type, member.linkname = getattr(tarfile, kind), str(secret)
                else:
                    member.size = len(data)
                tar.addfile(member, io.BytesIO(data or b""))
    before = files_below(yard.parent)
    strict = data_command(yard, "index", "shards")
    assert strict.returncode == 2 and strict.stderr.count("link or device") == len(kinds)
    assert not (yard / "shards" / "manifest.json").exists()
    assert data_command(yard, "index", "shards", "--salvage").returncode == 0
    assert read_everything(yard)["evaluation"]["good"] == len(kinds)
    new = files_below(yard.parent) - before
    assert all(name.endswith((".index", "/manifest.json")) for name in new), new
    assert all("a password" not in (yard.parent / name).read_text(errors="replace") for name in new)


def test_no_address_is_a_command(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(yard / "shards" / "a.tar", [("a.jpg", JPEG), ("a.txt", b"good")])
    before = files_below(yard.parent)
    done = data_command(
        yard, "index", "--out", "shards", "--", "pipe:touch canary; cat shards/a.tar"
    )
    assert done.returncode == 2 and "commands are never run to read data" in done.stderr, (
        done.stderr
    )
    monkeypatch.chdir(yard)
    for address in (
        "pipe:touch canary",
        "-o canary",
        "file:///dev/null;touch canary",
        "$(touch canary)",
        "`touch canary`",
        "shards/a.tar|touch canary",
        "http://127.0.0.1:9/;touch canary",
        "ext::touch canary",
        "javascript:x",
        "@canary-list",
        "shards/{b,$(touch canary)}.tar",
    ):
        with pytest.raises(VlmError):
            index_shards(address, "shards", workers=0, timeout_seconds=1)
        with pytest.raises(VlmError):
            load_manifest(address, timeout_seconds=1)
    assert files_below(yard.parent) == before


@pytest.mark.parametrize("field", ["name", "index"])
def test_a_manifest_cannot_point_elsewhere(yard: Path, field: str) -> None:
    write_tar(yard / "shards" / "a.tar", [("a.jpg", JPEG), ("a.txt", b"good")])
    index_shards(str(yard / "shards"), workers=0)
    path = yard / "shards" / "manifest.json"
    manifest, tokenizer = json.loads(path.read_text()), Tokenizer.load(yard / "tokenizer.model")
    before = files_below(yard.parent)
    outside = yard / "outside.tar"
    for name in (
        "pipe:touch canary",
        "../outside.tar",
        str(outside),
        "/etc/passwd",
        "s3://bucket/x.tar",
        "a\0b",
    ):
        manifest["shards"][0][field] = name
        path.write_text(json.dumps(manifest))
        found: list[Batch] = []
        with contextlib.suppress(VlmError):
            found += read_all(
                load_manifest(str(yard / "shards")),
                tokenizer=tokenizer,
                data=settings(),
                image_size=8,
                context_length=8,
                micro_batch_size=1,
            )
        assert not any(batch.keys for batch in found), name
        assert all(problem.shard != str(outside) for batch in found for problem in batch.problems)
    assert files_below(yard.parent) == before


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "data_pipeline", "filter", "shards", "--config", "evil.yaml"),
        ("-m", "pretrain", "plan", "evil.yaml"),
    ],
)
def test_a_run_file_cannot_run_anything(yard: Path, words: tuple[str, ...]) -> None:
    write_tar(yard / "shards" / "a.tar", [("a.jpg", JPEG), ("a.txt", b"good")])
    index_shards(str(yard / "shards"), workers=0)
    tag = "!!python/object/apply:os.system ['touch canary']"
    (yard / "evil.yaml").write_text(f"data:\n  filters:\n    min_side: {tag}\n")
    before = files_below(yard.parent)
    done = run(yard, *words)
    assert done.returncode == 2 and "not usable YAML" in done.stderr, done.stderr[-2000:]
    assert files_below(yard.parent) == before
