"""`from pretrain import load_model`: embeddings, captions and preprocessing equal the commands'."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.shards.manifest import load_manifest
from pretrain.evaluate.command import read_set
from tests.support.launch import ROOT
from tests.support.shape_dataset import ShapeDataset
from tests.unit.pretrain.evaluate_support import RunFolder

SIDE = 48
"""Image size of the run of `RunFolder`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shapes: ShapeDataset) -> pretrain.TrainedModel:
    folder = RunFolder(tmp_path_factory.mktemp("api") / "run", shapes)
    return pretrain.load_model(str(folder.path), device="cpu")


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_embeddings_equal_those_of_a_forward_pass(
    model: pretrain.TrainedModel, shapes: ShapeDataset
) -> None:
    batch = next(iter(read_set(model, load_manifest(str(shapes.folder)), model.run.data)))
    tokens = model.model.token_batch(batch.text_ids, batch.text_positions)
    with torch.no_grad():
        out = model.model(batch.images, batch.text_ids, batch.text_lengths, tokens)
    images_ND = model.embed_images(list(batch.images))
    texts_ND = model.embed_texts(list(batch.captions))
    torch.testing.assert_close(images_ND, out.image_embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts_ND, out.text_embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(images_ND.norm(dim=1), torch.ones(len(images_ND)))
    assert len({tuple(row.tolist()) for row in images_ND}) > 1


def test_all_kinds_of_images(model: pretrain.TrainedModel, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(pixels))
    kinds = [path, str(path), path.read_bytes(), pixels, Image.fromarray(pixels)]
    first, *others = [model.preprocess(image) for image in kinds]
    assert first.dtype == torch.uint8 and first.shape == (3, SIDE, SIDE)
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(model.preprocess(first), first)

    # Transparent pixels become white, whatever their color.
    transparent = np.concatenate([pixels, np.zeros((40, 60, 1), np.uint8)], axis=2)
    for image in (encoded(transparent), transparent, Image.fromarray(transparent, "RGBA")):
        assert (model.preprocess(image) == 255).all()


def test_a_pillow_image_equals_its_file(model: pretrain.TrainedModel) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated
    gray = Image.fromarray(np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60))
    images = [
        (Image.fromarray(pixels), {"exif": exif}),
        (gray, {}),
        (Image.fromarray(pixels).convert("P"), {}),
        (Image.fromarray(pixels[..., 0]), {}),
        (Image.fromarray(pixels).convert("CMYK"), {"format": "TIFF"}),
    ]
    for image, options in images:
        buffer = io.BytesIO()
        image.save(buffer, **({"format": "PNG"} | options))
        data = buffer.getvalue()
        expected = model.preprocess(data)
        assert torch.equal(model.preprocess(Image.open(io.BytesIO(data))), expected)
        assert expected.float().std() > 5


def test_captions_equal_those_of_the_command(model: pretrain.TrainedModel, tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(encoded(pixels))
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "caption", str(model.run_dir), *map(str, paths)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    captions = model.caption(paths)
    assert done.stdout.splitlines() == [
        f"{path}: {caption}" for path, caption in zip(paths, captions, strict=True)
    ]


def test_several_batches_equal_one(model: pretrain.TrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (67, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    whole = model.embed_images(list(images))
    last = model.embed_images(list(images[60:]))
    assert whole.shape[0] == 67
    torch.testing.assert_close(whole[60:], last, atol=1e-5, rtol=0)
    assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, whole.shape[1])
    assert model.caption([]) == []


def test_errors_name_what_was_given(model: pretrain.TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[3, 8, 8\]"):
        model.preprocess(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="float64"):
        model.preprocess(np.zeros((8, 8, 3)))
    with pytest.raises(DataError):
        model.preprocess(b"not an image")
    with pytest.raises(FileNotFoundError):
        model.preprocess(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="list"):
        model.embed_texts("a fox")
    with pytest.raises(TypeError, match="list"):
        model.embed_images("fox.jpg")
    with pytest.raises(ConfigError, match="not a run folder"):
        pretrain.load_model(tmp_path)
    with pytest.raises(AttributeError):
        pretrain.no_such_name  # noqa: B018


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_examples_of_the_documentation_run(
    page: str, model: pretrain.TrainedModel, tmp_path: Path
) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert examples
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(model.run_dir)
    for folder in ("images", "docs"):
        (tmp_path / folder).mkdir()
        for seed in range(3):
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            (tmp_path / folder / f"{seed}.png").write_bytes(encoded(pixels))
    for example in examples:
        outputs = re.findall(r"^(similarity\w*) = ", example, re.MULTILINE)
        shapes = "".join(f"print({name}.shape)\n" for name in outputs)
        script = tmp_path / "example.py"
        script.write_text(example + shapes)
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) > 1
        assert done.stdout.count("torch.Size([3, 2])") == len(outputs)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, pretrain; assert 'torch' not in sys.modules; print(pretrain.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()[0].isdigit()
