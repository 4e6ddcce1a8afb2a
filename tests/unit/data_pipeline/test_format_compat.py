"""Shards of others and ours: what we write plain webdataset reads, and what others write we index
and read.

Each test compares two readers sample for sample: one that goes through our index, and webdataset's
own.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset

from data_pipeline.common.errors import DataError
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index
from data_pipeline.shards.writer import write_shards

Sample = dict[str, bytes]


def ours(manifest: Manifest) -> list[Sample]:
    """Every sample, read through the index as training does it."""
    found = []
    for entry in manifest.shards:
        data, index = Path(manifest.shard_url(entry)).read_bytes(), load_index(manifest, entry)
        for i in range(len(index)):
            offset, extent = int(index.offsets[i]), int(index.extents[i])
            piece = data[offset : offset + extent]
            assert zlib.crc32(piece) == index.crc32[i]
            files = {m.extension: piece[m.start : m.start + m.size] for m in index.members(i)}
            found.append({"__key__": index.key(i).encode()} | files)
    return found


def theirs(shards: list[Path]) -> list[Sample]:
    """Every sample as webdataset gives it."""
    dataset = webdataset.WebDataset(
        [str(path) for path in shards], shardshuffle=False, empty_check=False
    )
    return [
        {"__key__": sample["__key__"].encode()}
        | {name: body for name, body in sample.items() if not name.startswith("__")}
        for sample in dataset
    ]


def made(count: int) -> list[dict[str, object]]:
    draw = random.Random(3)
    return [
        {
            "__key__": f"part/{i:06d}",
            "jpg": draw.randbytes(draw.randrange(2000)),
            "txt": f"caption {i} é",
            "json": {"url": f"http://x/{i}", "width": i},
        }
        for i in range(count)
    ]


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    given = [*made(30), {"__key__": "ж" * 80 + "/" + "n" * 150, "seg.png": b"p", "txt": ""}]
    manifest = write_shards(given, tmp_path, samples_per_shard=12)
    found = theirs(sorted(tmp_path.glob("*.tar")))
    assert found == ours(manifest)
    assert [sample["__key__"].decode() for sample in found] == [
        sample["__key__"] for sample in given
    ]
    assert found[30]["seg.png"] == b"p"
    assert json.loads(found[7]["json"]) == given[7]["json"]


def test_our_shards_are_byte_for_byte_those_of_its_writer(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), mtime=0) as tar:
        for sample in made(5):
            tar.write({**sample, "json": json.dumps(sample["json"], ensure_ascii=False).encode()})
    manifest = write_shards(made(5), tmp_path)
    assert (tmp_path / manifest.shards[0].name).read_bytes() == (
        tmp_path / "theirs.tar"
    ).read_bytes()


def test_what_its_shard_writer_writes(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=12, verbose=0) as writer:
        for sample in made(30):
            writer.write(sample)
    manifest = index_shards(f"{tmp_path}/x-{{000000..000002}}.tar")
    assert [shard.samples for shard in manifest.shards] == [12, 12, 6]
    assert ours(manifest) == theirs(sorted(tmp_path.glob("*.tar")))


def img2dataset_folder(folder: Path, *, shards: int, per_shard: int, captions: bool = True) -> Path:
    """A folder as img2dataset 1.45 leaves it (`--output_format webdataset`, its default settings).

    Its writer is webdataset's TarWriter on an open file with members .jpg, .json and .txt; keys are
    the shard's number in five digits and the sample's in four, pictures that could not be had leave
    gaps; beside each shard lie NNNNN.parquet and NNNNN_stats.json.
    """
    folder.mkdir(parents=True)
    draw = random.Random(9)
    for shard in range(shards):
        with open(folder / f"{shard:05d}.tar", "wb") as file:
            tar = webdataset.TarWriter(file)
            for number in range(per_shard):
                key = f"{shard:05d}{number:04d}"
                if draw.random() < 0.2:
                    continue
                caption = f"a caption of {key}" if draw.random() < 0.9 else ""
                meta = {
                    "caption": caption,
                    "url": f"https://x/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 256,
                    "height": 256,
                    "original_width": 640,
                    "original_height": 480,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                sample = {"__key__": key, "jpg": draw.randbytes(draw.randrange(500, 3000))}
                sample |= {"txt": caption} if captions else {}
                tar.write(sample | {"json": json.dumps(meta, indent=4)})
            tar.close()
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1" + draw.randbytes(100) + b"PAR1")
        stats = {
            "count": per_shard,
            "successes": per_shard - 2,
            "failed_to_download": 2,
            "status_dict": {},
        }
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return folder


@pytest.mark.parametrize("captions", [True, False])
def test_an_img2dataset_folder(tmp_path: Path, captions: bool) -> None:
    folder = img2dataset_folder(tmp_path / "laion", shards=3, per_shard=20, captions=captions)
    before = {path.name for path in folder.iterdir()}
    manifest = index_shards(str(folder))
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert ours(manifest) == theirs(sorted(folder.glob("*.tar")))
    assert 30 < manifest.total_samples < 60
    kinds = {frozenset(sample) for sample in ours(manifest)}
    assert kinds == {frozenset({"__key__", "jpg", "json"} | ({"txt"} if captions else set()))}
    made_here = {"manifest.json"} | {f"{name}.index" for name in before if name.endswith(".tar")}
    assert {path.name for path in folder.iterdir()} == before | made_here


def picture_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:03d}.jpg").write_bytes(bytes([number]) * (400 + number * 300))
        (folder / f"{number:03d}.txt").write_text(f"caption {number}")
    long = "a-very-long-name-" * 9
    (folder / f"{long}.jpg").write_bytes(b"long")
    (folder / f"{long}.txt").write_text("long")
    (folder / "README").write_text("no sample")
    return folder


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program here")
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "posix"])
@pytest.mark.parametrize("what", [["."], ["-T", "names"]])
def test_what_the_tar_program_writes(tmp_path: Path, format: str, what: list[str]) -> None:
    folder = picture_folder(tmp_path / "pictures")
    if format == "ustar":  # it has no room for the long name
        for path in folder.glob("a-very*"):
            path.unlink()
    names = sorted(path.name for path in folder.iterdir())
    (tmp_path / "names").write_text("".join(f"{name}\n" for name in names))
    command = [
        "tar",
        f"--format={format}",
        "--sort=name",
        "-C",
        str(folder),
        "-cf",
        str(tmp_path / "x.tar"),
    ]
    subprocess.run(
        [*command, *(str(tmp_path / part) if part == "names" else part for part in what)],
        check=True,
    )
    manifest = index_shards(str(tmp_path / "x.tar"))
    found = ours(manifest)
    assert found == theirs([tmp_path / "x.tar"])
    assert len(found) == len(names) // 2
    assert found[0]["__key__"] == (b"./000" if what == ["."] else b"000")


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program here")
def test_files_that_are_not_next_to_each_other_are_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name[::-1])
    subprocess.run(["tar", "-C", str(folder), "-cf", str(tmp_path / "x.tar"), *names], check=True)
    with pytest.raises(
        DataError, match="not next to each other; write the shard with its files sorted by name"
    ):
        index_shards(str(tmp_path / "x.tar"))


def test_open_clips_example_shards(tmp_path: Path) -> None:
    """Python's tarfile with plain TarInfo, as training scripts around open_clip make their
    shards."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as tar:
            for number in range(5):
                for name, body in (("png", b"p" * 900), ("txt", b"a photo")):
                    path = tmp_path / f"{number}.{name}"
                    path.write_bytes(body)
                    tar.add(path, f"{shard}_{number}.{name}")
    manifest = index_shards(f"{tmp_path}/{{0000..0001}}.tar")
    assert ours(manifest) == theirs(sorted(tmp_path.glob("*.tar")))
    assert manifest.total_samples == 10


def test_webdatasets_own_marks_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("__meta__/shard.json", "0.jpg", "__skip__", "0.txt", "._0.txt"):
            tar.addfile(tarfile.TarInfo(name))
    found = ours(index_shards(str(tmp_path / "x.tar")))
    assert found == theirs([tmp_path / "x.tar"]) == [{"__key__": b"0", "jpg": b"", "txt": b""}]
