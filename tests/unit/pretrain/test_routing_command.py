"""`vlmoe routing` on a run folder with a real model, shards and checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.config import apply_overrides, dump_yaml, from_mapping
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.settings import DataConfig, SourceConfig
from data_pipeline.shards.writer import write_shards
from pretrain.checkpoint import save
from pretrain.cli.main import main
from pretrain.config.experts import MoEConfig
from pretrain.config.schema import EvalConfig, EvalSet, RunConfig
from pretrain.evaluate.routing.command import all_grids, resolve_set, routing_command
from pretrain.evaluate.routing.counts import RoutingCounts
from pretrain.evaluate.routing.html_page import PageImage, crop
from pretrain.model import build_model
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from tests.support.shape_dataset import CAPTIONS, COLORS, ShapeDataset, render_shape_png

SMALL = [
    "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, "
    "patch_size: 16, context_length: 16, embed_dim: 16}",
    "moe={num_experts: 4, expert_width: 8}",
    "eval.batch_size=24",
    "data.workers=0",
    "parallel.engine=plain",
]


def make_run_folder(path: Path, shapes: ShapeDataset, *settings: str) -> RunConfig:
    """A run with random weights, large enough that routing differs between tokens."""
    overrides = [
        *SMALL,
        *shapes.overrides,
        f"eval.sets=[{{name: held, shards: {shapes.folder}}}]",
        *settings,
    ]
    run = from_mapping(RunConfig, apply_overrides({}, overrides))
    torch.manual_seed(0)
    model = build_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision="fp32",
        num_experts=run.moe.num_experts,
    )

    path.mkdir()
    tokenizer = Tokenizer.load(shapes.tokenizer)
    (path / "config.yaml").write_text(dump_yaml(run))
    (path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    save(
        PlainEngine(model, run.optim, layout, torch.device("cpu")),
        root=path / "checkpoints",
        step=3,
        state_json={"tokenizer": tokenizer.fingerprint},
    )
    return run


def test_all_outputs_agree(
    tmp_path: Path, shapes: ShapeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run_folder(tmp_path / "run", shapes)
    assert main(["routing", str(tmp_path / "run"), "--samples", "40"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "run" / "routing"

    report = json.loads((out / "routing.json").read_text())
    assert (report["pairs"], report["set"], report["step"]) == (40, "held", 3)
    assert report["corrupt_samples"] == 0
    assert report["tokens"]["image"] == 40 * 9
    assert [layer["block"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        assert f"layer {layer['block']:02d}" in printed
        for modality, tokens in report["tokens"].items():
            num_tokens = sum(expert["num_tokens"][modality] for expert in layer["experts"])
            assert num_tokens == 2 * tokens
            assert sum(map(sum, layer["coactivation_counts"][modality])) == 4 * tokens

    page = (out / "routing.html").read_text()
    assert page.count("<table>") == 2 and "<script" not in page
    num_patches = sum(
        len(expert["patches"]) for layer in report["layers"] for expert in layer["experts"]
    )
    assert page.count('class="patch"') == num_patches
    assert Image.open(out / "routing.png").width > 400


def test_the_report_does_not_depend_on_the_batch_size(tmp_path: Path, shapes: ShapeDataset) -> None:
    run = make_run_folder(tmp_path / "run", shapes)
    report = routing_command(tmp_path / "run", samples=20)
    smaller = replace(run, eval=replace(run.eval, batch_size=7))
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(smaller))
    assert routing_command(tmp_path / "run", samples=20)["layers"][1] == report["layers"][1]


def test_coactivation_grids_are_of_their_layer_and_modality() -> None:
    run = RunConfig(moe=MoEConfig(num_experts=3))
    blocks = run.moe.blocks(run.model.num_layers)
    counts = RoutingCounts(len(blocks), 3)
    counts.coactivation_LMEE[0, 0, 0, 1] = counts.coactivation_LMEE[0, 0, 1, 0] = 50
    counts.coactivation_LMEE[1, 1, 1, 2] = counts.coactivation_LMEE[1, 1, 2, 1] = 50

    cells = {}
    for grid in all_grids(counts, run):
        positive = np.argwhere(grid.ratio_RC > 0).tolist()
        if positive:
            cells[grid.title.partition(":")[0]] = positive
    assert cells == {
        f"layer {blocks[0]:02d}, image tokens": [[0, 1], [1, 0]],
        f"layer {blocks[1]:02d}, text tokens": [[1, 2], [2, 1]],
    }


def test_top_1_routing_has_load_grids_only() -> None:
    run = RunConfig(moe=MoEConfig(num_experts=3, top_k=1))
    counts = RoutingCounts(len(run.moe.blocks(run.model.num_layers)), 3)
    assert len(all_grids(counts, run)) == 2


def test_patches_are_shown_with_their_images(
    tmp_path: Path, shapes: ShapeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run_folder(tmp_path / "run", shapes)
    shown: dict[int, PageImage] = {}

    def keep_images(
        report: object, grids: object, images: dict[int, PageImage], **options: object
    ) -> str:
        shown.update(images)
        return ""

    monkeypatch.setattr("pretrain.evaluate.routing.command.routing_page", keep_images)
    report = routing_command(tmp_path / "run", samples=64)
    samples = {
        patch["sample"]
        for layer in report["layers"]
        for expert in layer["experts"]
        for patch in expert["patches"]
    }
    assert set(shown) == samples and samples
    for sample, image in shown.items():
        assert (image.key, image.caption) == (shapes.keys[sample], shapes.captions[sample])
        # The third word of a caption is the color of the shape: some patch shows it.
        color = COLORS[image.caption.split()[2]]
        patches = [crop(image.image, patch, 16) for patch in range(9)]
        assert any((patch == color).all(axis=2).sum() > 20 for patch in patches)


def test_training_data_can_be_selected(tmp_path: Path, shapes: ShapeDataset) -> None:
    make_run_folder(tmp_path / "run", shapes)
    report = routing_command(tmp_path / "run", name="train", samples=8)
    assert report["shards"] == str(shapes.folder)


def test_other_shards_with_corrupt_samples(tmp_path: Path, shapes: ShapeDataset) -> None:
    make_run_folder(tmp_path / "run", shapes)
    samples: list[dict[str, object]] = [
        {"__key__": str(n), "png": render_shape_png(caption, 48), "txt": "<script>" + caption}
        for n, caption in enumerate(CAPTIONS[:4])
    ]
    samples[1]["png"] = b"not an image"
    write_shards(samples, tmp_path / "others")
    out = tmp_path / "out"
    report = routing_command(tmp_path / "run", shards=str(tmp_path / "others"), out=out)
    assert (report["pairs"], report["corrupt_samples"]) == (3, 1)
    assert "<script" not in (out / "routing.html").read_text()

    write_shards([samples[1]], tmp_path / "corrupt")
    with pytest.raises(DataError, match=r"none of 1 sample .*'corrupt-image': 1"):
        routing_command(tmp_path / "run", shards=str(tmp_path / "corrupt"))


def test_a_dense_run_is_an_error(tmp_path: Path, shapes: ShapeDataset) -> None:
    make_run_folder(tmp_path / "run", shapes, "moe.stop=0")
    with pytest.raises(ConfigError, match=r"moe\.stop 0"):
        routing_command(tmp_path / "run")


def test_an_unknown_set_is_an_error(tmp_path: Path, shapes: ShapeDataset) -> None:
    run = make_run_folder(tmp_path / "run", shapes)
    with pytest.raises(ConfigError, match=r"'hold'.* held, train"):
        resolve_set(run, "hold")
    with pytest.raises(ConfigError, match="--shards"):
        resolve_set(RunConfig(moe=MoEConfig()), "")


def test_a_set_is_read_with_its_own_keys() -> None:
    source = SourceConfig(shards="t", name="own", caption_keys=("en.txt",))
    sets = (EvalSet(name="held", shards="e", caption_keys=("json:captions",)),)
    run = RunConfig(data=DataConfig(train=(source,)), eval=EvalConfig(sets=sets))
    for name, shards, key in (
        ("held", "e", "json:captions"),
        ("own", "t", "en.txt"),
        ("train", "t", "en.txt"),
    ):
        _, address, data = resolve_set(run, name)
        assert (address, data.caption_keys, data.caption_weights) == (shards, (key,), (1.0,))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "a", "--shards", "b"], ["--set", "--shards"]),
        (["--samples", "0"], ["--samples is 0", "at least 1"]),
    ],
)
def test_invalid_options_are_usage_errors(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["routing", "run", *arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(part in error for part in parts)
