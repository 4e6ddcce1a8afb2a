"""Compatibility with other tools: webdataset reads our shards, and we index and read shards written
by webdataset, img2dataset, tar and tarfile.

Each test compares, sample by sample, a reader that uses our index with webdataset's own reader.
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

needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="the tar program is missing")


def read_with_index(manifest: Manifest) -> list[Sample]:
    """Every sample, read through the index as in training."""
    samples = []
    for entry in manifest.shards:
        data, index = Path(manifest.shard_url(entry)).read_bytes(), load_index(manifest, entry)
        for i in range(len(index)):
            offset, extent = int(index.offsets[i]), int(index.extents[i])
            chunk = data[offset : offset + extent]
            assert zlib.crc32(chunk) == index.crc32[i]
            files = {m.extension: chunk[m.start : m.start + m.size] for m in index.members(i)}
            samples.append({"__key__": index.key(i).encode()} | files)
    return samples


def read_with_webdataset(shards: list[Path]) -> list[Sample]:
    """Every sample, read by webdataset."""
    dataset = webdataset.WebDataset(
        [str(path) for path in shards], shardshuffle=False, empty_check=False
    )
    samples = []
    for sample in dataset:
        files = {name: content for name, content in sample.items() if not name.startswith("__")}
        samples.append({"__key__": sample["__key__"].encode()} | files)
    return samples


def make_samples(count: int) -> list[dict[str, object]]:
    rng = random.Random(3)
    return [
        {
            "__key__": f"part/{i:06d}",
            "jpg": rng.randbytes(rng.randrange(2000)),
            "txt": f"caption {i} é",
            "json": {"url": f"http://x/{i}", "width": i},
        }
        for i in range(count)
    ]


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    long_key = "ж" * 80 + "/" + "n" * 150
    samples = [*make_samples(30), {"__key__": long_key, "seg.png": b"p", "txt": ""}]
    manifest = write_shards(samples, tmp_path, samples_per_shard=12)
    read = read_with_webdataset(sorted(tmp_path.glob("*.tar")))
    assert read == read_with_index(manifest)
    assert [sample["__key__"].decode() for sample in read] == [
        sample["__key__"] for sample in samples
    ]
    assert read[30]["seg.png"] == b"p"
    assert json.loads(read[7]["json"]) == samples[7]["json"]


def test_our_shards_equal_those_of_tar_writer(tmp_path: Path) -> None:
    path = tmp_path / "webdataset.tar"
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for sample in make_samples(5):
            tar.write({**sample, "json": json.dumps(sample["json"], ensure_ascii=False).encode()})
    manifest = write_shards(make_samples(5), tmp_path)
    assert (tmp_path / manifest.shards[0].name).read_bytes() == path.read_bytes()


def test_webdataset_shard_writer(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=12, verbose=0) as writer:
        for sample in make_samples(30):
            writer.write(sample)
    manifest = index_shards(f"{tmp_path}/x-{{000000..000002}}.tar")
    assert [shard.samples for shard in manifest.shards] == [12, 12, 6]
    assert read_with_index(manifest) == read_with_webdataset(sorted(tmp_path.glob("*.tar")))


def write_img2dataset_folder(
    folder: Path, *, shards: int, per_shard: int, captions: bool = True
) -> None:
    """Write a folder like img2dataset 1.45 (`--output_format webdataset`, default settings).

    img2dataset uses webdataset's TarWriter on an open file with members .jpg, .json and .txt. Keys
    are the shard index in five digits and the sample index in four; failed downloads leave gaps.
    NNNNN.parquet and NNNNN_stats.json are beside each shard.
    """
    folder.mkdir(parents=True)
    rng = random.Random(9)
    for shard in range(shards):
        with open(folder / f"{shard:05d}.tar", "wb") as file:
            tar = webdataset.TarWriter(file)
            for index in range(per_shard):
                if rng.random() < 0.2:
                    continue
                key = f"{shard:05d}{index:04d}"
                caption = f"a caption of {key}" if rng.random() < 0.9 else ""
                sample = {"__key__": key, "jpg": rng.randbytes(rng.randrange(500, 3000))}
                sample |= {"txt": caption} if captions else {}
                tar.write(sample | {"json": json.dumps(_metadata(key, caption), indent=4)})
            tar.close()

        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1" + rng.randbytes(100) + b"PAR1")
        stats = {
            "count": per_shard,
            "successes": per_shard - 2,
            "failed_to_download": 2,
            "status_dict": {},
        }
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def _metadata(key: str, caption: str) -> dict[str, object]:
    return {
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


@pytest.mark.parametrize("captions", [True, False])
def test_img2dataset_folder(tmp_path: Path, captions: bool) -> None:
    folder = tmp_path / "laion"
    write_img2dataset_folder(folder, shards=3, per_shard=20, captions=captions)
    before = {path.name for path in folder.iterdir()}
    manifest = index_shards(str(folder))
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    samples = read_with_index(manifest)
    assert samples == read_with_webdataset(sorted(folder.glob("*.tar")))
    assert 30 < manifest.total_samples < 60

    members = {"__key__", "jpg", "json"} | ({"txt"} if captions else set())
    assert {frozenset(sample) for sample in samples} == {frozenset(members)}
    new_files = {"manifest.json"} | {f"{name}.index" for name in before if name.endswith(".tar")}
    assert {path.name for path in folder.iterdir()} == before | new_files


def make_image_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:03d}.jpg").write_bytes(bytes([number]) * (400 + number * 300))
        (folder / f"{number:03d}.txt").write_text(f"caption {number}")
    long = "a-very-long-name-" * 9
    (folder / f"{long}.jpg").write_bytes(b"long")
    (folder / f"{long}.txt").write_text("long")
    (folder / "README").write_text("no sample")
    return folder


@needs_tar
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "posix"])
@pytest.mark.parametrize("from_list", [False, True])
def test_tar_program(tmp_path: Path, format: str, from_list: bool) -> None:
    folder, archive = make_image_folder(tmp_path / "images"), tmp_path / "x.tar"
    if format == "ustar":  # its headers have no space for the long name
        for path in folder.glob("a-very*"):
            path.unlink()
    names = sorted(path.name for path in folder.iterdir())
    (tmp_path / "names").write_text("".join(f"{name}\n" for name in names))

    options = [f"--format={format}", "--sort=name", "-C", str(folder), "-cf", str(archive)]
    inputs = ["-T", str(tmp_path / "names")] if from_list else ["."]
    subprocess.run(["tar", *options, *inputs], check=True)

    samples = read_with_index(index_shards(str(archive)))
    assert samples == read_with_webdataset([archive])
    assert len(samples) == len(names) // 2
    assert samples[0]["__key__"] == (b"000" if from_list else b"./000")


@needs_tar
def test_unsorted_members_are_rejected(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path / "images")
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name[::-1])
    subprocess.run(["tar", "-C", str(folder), "-cf", str(tmp_path / "x.tar"), *names], check=True)
    with pytest.raises(DataError, match="sorted by name"):
        index_shards(str(tmp_path / "x.tar"))


def test_tarfile_shards(tmp_path: Path) -> None:
    """Shards written by Python's tarfile with plain TarInfo, as in scripts for open_clip."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as tar:
            for number in range(5):
                for extension, content in (("png", b"p" * 900), ("txt", b"a photo")):
                    path = tmp_path / f"{number}.{extension}"
                    path.write_bytes(content)
                    tar.add(path, f"{shard}_{number}.{extension}")
    manifest = index_shards(f"{tmp_path}/{{0000..0001}}.tar")
    assert read_with_index(manifest) == read_with_webdataset(sorted(tmp_path.glob("*.tar")))
    assert manifest.total_samples == 10


def test_metadata_members_are_ignored(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("__meta__/shard.json", "0.jpg", "__skip__", "0.txt", "._0.txt"):
            tar.addfile(tarfile.TarInfo(name))
    samples = read_with_index(index_shards(str(archive)))
    assert samples == [{"__key__": b"0", "jpg": b"", "txt": b""}]
    assert read_with_webdataset([archive]) == samples
