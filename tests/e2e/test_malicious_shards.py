"""Malicious datasets must not run code, write files elsewhere, or exhaust the memory."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import VlmError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import load_manifest
from tests.support.launch import ROOT, clean_environment
from tests.support.malicious_samples import JPEG, MaliciousSample, malicious_samples
from tests.support.small_shards import make_data_config, make_tokenizer

pytestmark = pytest.mark.e2e

MAX_MIB = 1024
"""Maximum memory of a process that reads the samples."""
GOOD_SAMPLE = [("a.jpg", JPEG), ("a.txt", b"good")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `shards/` and a tokenizer; no other files may be created in it."""
    (tmp_path / "shards").mkdir()
    make_tokenizer(tmp_path)
    return tmp_path


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean_environment({"PYTHONPATH": str(ROOT)}),
        text=True,
        capture_output=True,
        timeout=120,
        errors="replace",
    )


def data_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(folder, "-m", "data_pipeline", *arguments)


def read_all_samples(folder: Path) -> dict[str, Any]:
    """The report of `tests/support/read_all_samples.py` on `shards/`."""
    done = run_python(folder, "-m", "tests.support.read_all_samples", "shards", "tokenizer.model")
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_samples(path: Path, samples: dict[str, MaliciousSample]) -> None:
    members = []
    for key, sample in sorted(samples.items()):
        members += [(f"{key}.{extension}", data) for extension, data in sample.files.items()]
    write_tar(path, members)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_malicious_samples_are_counted(folder: Path) -> None:
    canary = folder / "canary"
    samples = malicious_samples(canary)
    write_samples(folder / "shards" / "a.tar", samples)
    files = files_below(folder.parent)

    indexed = data_command(folder, "index", "shards")
    assert indexed.returncode == 0, indexed.stderr
    assert load_manifest(str(folder / "shards")).total_samples == len(samples)

    report = read_all_samples(folder)
    expected = dict(Counter(sample.result for sample in samples.values()))
    assert report["evaluation"] == report["training"] == expected
    assert report["peak_mib"] < MAX_MIB

    assert not canary.exists()
    new_files = files_below(folder.parent) - files
    assert new_files == {
        f"{folder.name}/shards/{name}" for name in ("manifest.json", "a.tar.index")
    }


def test_dataset_commands_on_malicious_samples(folder: Path) -> None:
    canary = folder / "canary"
    write_samples(folder / "shards" / "a.tar", malicious_samples(canary))
    index_shards(str(folder / "shards"), workers=0)
    files = files_below(folder.parent)
    for command in ("check shards", "stats shards", "peek shards", "filter shards --min-side 10"):
        done = data_command(folder, *command.split())
        assert done.returncode in (0, 1, 2), (command, done.stderr[-2000:])
        assert "Traceback" not in done.stderr, (command, done.stderr[-2000:])
        assert "\x1b" not in done.stdout + done.stderr
    assert not canary.exists()
    assert files_below(folder.parent) == files


def write_shard_with_link(path: Path, member_type: bytes, target: Path) -> None:
    """Write two samples; the caption of the second is a link or device."""
    with tarfile.open(path, "w") as tar:
        for name, data in (*GOOD_SAMPLE, ("b.txt", None), ("b.jpg", JPEG)):
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = member_type, str(target)
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))


def test_links_and_devices_are_not_followed(folder: Path) -> None:
    secret = folder / "secret.txt"
    secret.write_text("a password")
    kinds = ("SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE")
    for kind in kinds:
        write_shard_with_link(folder / "shards" / f"{kind}.tar", getattr(tarfile, kind), secret)
    files = files_below(folder.parent)

    strict = data_command(folder, "index", "shards")
    assert strict.returncode == 2
    assert strict.stderr.count("the member 'b.txt' at byte") == len(kinds)
    assert not (folder / "shards" / "manifest.json").exists()
    assert data_command(folder, "index", "shards", "--salvage").returncode == 0
    assert read_all_samples(folder)["evaluation"]["good"] == len(kinds)

    new_files = files_below(folder.parent) - files
    assert all(name.endswith((".index", "/manifest.json")) for name in new_files), new_files
    for name in new_files:
        assert "a password" not in (folder.parent / name).read_text(errors="replace")


def test_addresses_are_not_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(folder / "shards" / "a.tar", GOOD_SAMPLE)
    files = files_below(folder.parent)
    pipe = "pipe:touch canary; cat shards/a.tar"
    done = data_command(folder, "index", "--out", "shards", "--", pipe)
    assert done.returncode == 2 and "commands are never run" in done.stderr, done.stderr

    monkeypatch.chdir(folder)
    addresses = (
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
    )
    for address in addresses:
        with pytest.raises(VlmError):
            index_shards(address, "shards", workers=0, timeout_seconds=1)
        with pytest.raises(VlmError):
            load_manifest(address, timeout_seconds=1)
    assert files_below(folder.parent) == files


@pytest.mark.parametrize("field", ["name", "index"])
def test_manifest_cannot_name_other_files(folder: Path, field: str) -> None:
    shards, outside = folder / "shards", folder / "outside.tar"
    write_tar(shards / "a.tar", GOOD_SAMPLE)
    index_shards(str(shards), workers=0)
    path = shards / "manifest.json"
    manifest, tokenizer = json.loads(path.read_text()), Tokenizer.load(folder / "tokenizer.model")
    files = files_below(folder.parent)
    names = (
        *("pipe:touch canary", "../outside.tar", str(outside)),
        *("/etc/passwd", "s3://bucket/x.tar", "a\0b"),
    )
    for name in names:
        manifest["shards"][0][field] = name
        path.write_text(json.dumps(manifest))
        batches: list[Batch] = []
        with contextlib.suppress(VlmError):
            batches += read_all(
                load_manifest(str(shards)),
                tokenizer=tokenizer,
                data=make_data_config(),
                batch=BatchSpec(image_size=8, context_length=8, micro_batch_size=1),
            )
        assert not any(batch.keys for batch in batches), name
        problems = [problem for batch in batches for problem in batch.problems]
        assert all(problem.shard != str(outside) for problem in problems)
    assert files_below(folder.parent) == files


@pytest.mark.parametrize(
    "command",
    [
        "-m data_pipeline filter shards --config evil.yaml",
        "-m pretrain plan evil.yaml",
    ],
)
def test_yaml_files_cannot_run_code(folder: Path, command: str) -> None:
    write_tar(folder / "shards" / "a.tar", GOOD_SAMPLE)
    index_shards(str(folder / "shards"), workers=0)
    tag = "!!python/object/apply:os.system ['touch canary']"
    (folder / "evil.yaml").write_text(f"data:\n  filters:\n    min_side: {tag}\n")
    files = files_below(folder.parent)
    done = run_python(folder, *command.split())
    assert done.returncode == 2 and "invalid YAML" in done.stderr, done.stderr[-2000:]
    assert files_below(folder.parent) == files
