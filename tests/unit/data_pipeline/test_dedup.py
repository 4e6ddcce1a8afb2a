from __future__ import annotations

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.drop_list import read_drop_list
from data_pipeline.preparing.dedup import CRITERIA, find_groups
from data_pipeline.preparing.sample_hashes import HAS_CAPTION, HAS_PERCEPTUAL, READABLE, Hashes
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.photos import jpeg, photo


def many_hashes(count: int) -> Hashes:
    """Hashes where every tenth sample of the second half is near one of the first half."""
    rng = np.random.default_rng(0)
    perceptual = rng.integers(0, 2**64, count, dtype=np.uint64)
    num_near = len(perceptual[count // 2 :: 10])
    perceptual[count // 2 :: 10] = perceptual[:num_near] ^ np.uint64(0b11)
    rows = np.arange(count)
    return Hashes(
        dataset=rows * 0,
        shard=rows // 1000,
        sample=rows % 1000,
        file=perceptual + np.uint64(1),
        perceptual=perceptual,
        caption=rng.integers(0, 2**63, count).astype(np.uint64),
        flags=np.full(count, READABLE | HAS_PERCEPTUAL | HAS_CAPTION, np.uint64),
    )


def test_100_000_images_take_seconds() -> None:
    hashes = many_hashes(100_000)
    start = time.process_time()
    groups = find_groups(hashes, "near", distance=3)
    # About 1 s on an idle machine; comparing all pairs would take minutes.
    assert time.process_time() - start < 20
    assert len(groups.dropped) == 5_000
    assert groups.representative[50_000] == 0


def write_datasets(folder: Path) -> None:
    """`train`: 8 samples with duplicates; `test`: a resized image from `train`, and another."""
    a, b, c = photo(1), photo(2), photo(3)
    uniform = jpeg(np.full((40, 40, 3), 200, np.uint8))
    other_uniform = jpeg(np.full((40, 40, 3), 10, np.uint8))
    train = [
        (jpeg(a), "a tree"),
        (jpeg(b), "a house"),
        (jpeg(a), "A  tree"),
        (jpeg(a, 40), "a trunk"),
        (uniform, "grey"),
        (other_uniform, "black"),
        (b"broken", "a house"),
        (jpeg(c), "a house"),
    ]
    samples: list[dict[str, object]] = [
        {"__key__": f"{index}", "jpg": image, "txt": text}
        for index, (image, text) in enumerate(train)
    ]
    write_shards(samples, folder / "train", samples_per_shard=3)

    resized = jpeg(cv2.resize(b, (120, 120)))
    held_out: list[dict[str, object]] = [
        {"__key__": "x", "jpg": resized, "txt": "held out"},
        {"__key__": "y", "jpg": jpeg(photo(9)), "txt": "nothing"},
    ]
    write_shards(held_out, folder / "test")


def dropped(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: row.samples for name, row in read_drop_list(str(path)).shards.items()}


def run_dedup(*arguments: str | Path | int) -> int:
    return run_data_command("dedup", *arguments, "--workers", 0)


def test_each_criterion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_datasets(tmp_path)
    drop_lists = {}
    for criterion in CRITERIA:
        drop_list = tmp_path / criterion
        run_dedup(tmp_path / "train", "--by", criterion, "--drop-list", drop_list)
        drop_lists[criterion] = dropped(drop_list)
    assert drop_lists == {
        "exact": {"shard-000000.tar": (2,)},
        "near": {"shard-000000.tar": (2,), "shard-000001.tar": (0,)},
        "caption": {"shard-000000.tar": (2,), "shard-000002.tar": (1,)},
        "pair": {"shard-000000.tar": (2,)},
    }

    output = capsys.readouterr().out
    assert "8 samples, 1 of them unreadable" in output
    near = next(line for line in output.splitlines() if line.startswith("near"))
    assert near.split() == ["near", "1", "3", "2"]


def test_against_drops_only_from_the_training_set(tmp_path: Path) -> None:
    write_datasets(tmp_path)
    train, test = tmp_path / "train", tmp_path / "test"
    run_dedup(train, "--against", test, "--drop-list", tmp_path / "d.json")
    assert dropped(tmp_path / "d.json") == {"shard-000000.tar": (1, 2), "shard-000001.tar": (0,)}


def test_several_datasets_have_one_drop_list_each(tmp_path: Path) -> None:
    write_datasets(tmp_path)
    run_dedup(tmp_path / "test", tmp_path / "train", "--drop-list", tmp_path / "e.json")
    assert dropped(tmp_path / "e-0.json") == {}
    assert dropped(tmp_path / "e-1.json") == {"shard-000000.tar": (1, 2), "shard-000001.tar": (0,)}


def test_html_page_escapes_captions(tmp_path: Path) -> None:
    malicious = "<script>alert(1)</script>\u202e<img src=x>"
    samples: list[dict[str, object]] = [
        {"__key__": f"{index}", "jpg": jpeg(photo(1)), "txt": malicious} for index in range(10)
    ]
    write_shards(samples, tmp_path / "s")
    run_dedup(tmp_path / "s", "--html", tmp_path / "g.html", "--json", tmp_path / "g.json")

    page = (tmp_path / "g.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "\u202e" not in page
    assert "&lt;script&gt;" in page and "and 2 more" in page
    assert page.count("data:image/jpeg;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")
    groups = json.loads((tmp_path / "g.json").read_text())["groups"]
    assert [[row["sample"] for row in group] for group in groups] == [list(range(10))]


def test_stored_hashes_are_reused(tmp_path: Path) -> None:
    write_datasets(tmp_path)
    drop_list = tmp_path / "d"
    command = (tmp_path / "train", "--work-dir", tmp_path / "work", "--drop-list", drop_list)
    for part in range(2):
        run_dedup(*command, "--part", f"{part}/2")
    assert not drop_list.exists()

    for shard in (tmp_path / "train").glob("*.tar"):
        shard.unlink()
    run_dedup(*command)
    assert dropped(drop_list) == {"shard-000000.tar": (2,), "shard-000001.tar": (0,)}
    with pytest.raises(ConfigError, match=r"--distance 16: .*0\.\.15"):
        run_dedup(*command, "--distance", 16)
