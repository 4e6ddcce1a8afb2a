"""`from data_pipeline import Loader`, and the example of docs/data-pipeline.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipeline
from data_pipeline import DataConfig, Loader, LoaderState, RankInfo, SourceConfig
from data_pipeline.common.errors import ConfigError
from tests.support.launch import ROOT
from tests.support.shape_dataset import ShapeDataset, make_shape_dataset


def settings(shapes: ShapeDataset) -> DataConfig:
    source = SourceConfig(shards=str(shapes.folder))
    return DataConfig(train=(source,), tokenizer=str(shapes.tokenizer), workers=0)


def keys_of_steps(loader: Loader, steps: int) -> list[list[str]]:
    """The keys of each step, and closes the loader."""
    try:
        return [
            [key for batch in batches for key in batch.keys]
            for (batches, _), _ in zip(loader.steps(), range(steps), strict=False)
        ]
    finally:
        loader.close()


def open_loader(shapes: ShapeDataset, **options: object) -> Loader:
    return Loader.open(
        settings(shapes),
        image_size=32,
        context_length=16,
        global_batch_size=8,
        **options,  # type: ignore[arg-type]
    )


def test_an_epoch_has_every_sample_once(shapes: ShapeDataset) -> None:
    steps = keys_of_steps(open_loader(shapes), 8)
    assert [len(step) for step in steps] == [8] * 8
    assert len({key for step in steps for key in step}) == 64


def test_resume_and_ranks(shapes: ShapeDataset) -> None:
    whole = keys_of_steps(open_loader(shapes, seed=3), 4)
    assert whole != keys_of_steps(open_loader(shapes), 4)

    loader = open_loader(shapes, seed=3)
    steps = loader.steps()
    next(steps)
    _, state = next(steps)
    loader.close()
    resumed = LoaderState.from_json(state.to_json())
    assert keys_of_steps(open_loader(shapes, seed=3, state=resumed), 2) == whole[2:]

    parts = [
        keys_of_steps(open_loader(shapes, seed=3, ranks=RankInfo(rank=rank, world_size=2)), 4)
        for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_missing_tokenizer_and_unknown_name(shapes: ShapeDataset) -> None:
    data = DataConfig(train=(SourceConfig(shards=str(shapes.folder)),))
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        Loader.open(data, image_size=32, context_length=16, global_batch_size=8)
    with pytest.raises(AttributeError, match="no_such_name"):
        data_pipeline.no_such_name  # noqa: B018
    assert all(getattr(data_pipeline, name) is not None for name in data_pipeline.__all__)


def test_invalid_arguments_are_errors_before_the_first_batch(
    shapes: ShapeDataset, tmp_path: Path
) -> None:
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="rank is"):
            RankInfo(rank=rank, world_size=world_size)
    for name, value in (("image_size", 0), ("context_length", 1), ("micro_batch_size", 0)):
        sizes = {"image_size": 32, "context_length": 16, name: value}
        with pytest.raises(ConfigError, match=name):
            Loader.open(settings(shapes), global_batch_size=8, **sizes)

    manifest = json.loads((shapes.folder / "manifest.json").read_text())
    remote = manifest | {"base": "http://127.0.0.1:9/shards"}
    (tmp_path / "manifest.json").write_text(json.dumps(remote))
    source = SourceConfig(shards=str(tmp_path))
    data = DataConfig(train=(source,), tokenizer=str(shapes.tokenizer))
    with pytest.raises(ConfigError, match=r"data\.cache_dir is empty"):
        Loader.open(data, image_size=32, context_length=16, global_batch_size=8)


def test_micro_batches_of_the_given_size(shapes: ShapeDataset) -> None:
    loader = open_loader(shapes, micro_batch_size=2)
    batches, _ = next(loader.steps())
    loader.close()
    assert [len(batch.keys) for batch in batches] == [2] * 4


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, data_pipeline; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    """With small images, and ended after two steps."""
    page = (ROOT / "docs" / "data-pipeline.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 1 and len(examples[0].split("\n")) <= 14
    for name in ("own", "web"):
        shapes = make_shape_dataset(tmp_path / name, pairs=64, samples_per_shard=16)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(shapes.folder)
    (tmp_path / "tokenizer.model").write_bytes(Path(shapes.tokenizer).read_bytes())
    script = tmp_path / "example.py"
    # Indented like the last line of the loop.
    end = (
        "        assert images.shape == (64, 3, 224, 224) and not problems\n"
        "        print(saved['position'])\n"
        "        if saved['position'] == 128:\n"
        "            loader.close()\n"
    )
    script.write_text(examples[0] + end)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["64", "128"]
