"""`vlmoe routing` on a real run folder: files that agree with one another and with the model."""

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
from data_pipeline.shards.writer import write_shards
from pretrain.checkpoint import save
from pretrain.cli.main import main
from pretrain.config.experts import MoEConfig
from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.command import all_grids, find_set, routing_command
from pretrain.evaluate.routing.page import PagePicture, crop
from pretrain.evaluate.routing.tally import Tally
from pretrain.model import build_model
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from tests.support.shards import CAPTIONS, COLORS, Shapes, picture

SMALL = [
    "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, patch_size: 16, "
    "context_length: 16, embed_dim: 16}",
    "moe={num_experts: 4, expert_width: 8}",
    "eval.batch_size=24",
    "data.workers=0",
    "parallel.engine=plain",
]


def run_folder(path: Path, shapes: Shapes, *settings: str) -> RunConfig:
    """A run with random weights, large enough that routers differ between tokens."""
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
        rank_state={},
    )
    return run


def test_all_files_are_written_and_agree(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "run", shapes)
    assert main(["routing", str(tmp_path / "run"), "--samples", "40"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "routing" / "routing.json").read_text())
    assert (report["pairs"], report["set"], report["step"], report["bad_samples"]) == (
        40,
        "held",
        3,
        0,
    )
    assert report["tokens"]["image"] == 40 * 9
    assert [layer["block"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        for modality in ("image", "text"):
            visits = sum(expert["visits"][modality] for expert in layer["experts"])
            assert visits == 2 * report["tokens"][modality]
            counts = layer["together_counts"][modality]
            assert sum(map(sum, counts)) == 4 * report["tokens"][modality]
        assert f"layer {layer['block']:02d}" in printed
    page = (tmp_path / "run" / "routing" / "routing.html").read_text()
    assert page.count("<table>") == 2 and "<script" not in page
    assert page.count('class="patch"') == sum(
        len(e["patches"]) for la in report["layers"] for e in la["experts"]
    )
    assert Image.open(tmp_path / "run" / "routing" / "routing.png").width > 400


def test_a_batch_changes_nothing_and_the_same_samples_are_chosen(
    tmp_path: Path, shapes: Shapes
) -> None:
    run = run_folder(tmp_path / "run", shapes)
    one = routing_command(tmp_path / "run", samples=20)
    (tmp_path / "run" / "config.yaml").write_text(
        dump_yaml(replace(run, eval=replace(run.eval, micro_batch_size=7)))
    )
    assert routing_command(tmp_path / "run", samples=20)["layers"][1] == one["layers"][1]


def test_a_grid_of_pairs_is_that_of_its_layer_and_modality() -> None:
    run = RunConfig(moe=MoEConfig(num_experts=3))
    blocks = run.moe.blocks(run.model.num_layers)
    tally = Tally(len(blocks), 3)
    tally.together_LMEE[0, 0, 0, 1] = tally.together_LMEE[0, 0, 1, 0] = 50
    tally.together_LMEE[1, 1, 1, 2] = tally.together_LMEE[1, 1, 2, 1] = 50
    known = {grid.title: np.argwhere(grid.ratio_RC > 0).tolist() for grid in all_grids(tally, run)}
    known = {title.partition(":")[0]: cells for title, cells in known.items() if cells}
    assert known == {
        f"layer {blocks[0]:02d}, image tokens": [[0, 1], [1, 0]],
        f"layer {blocks[1]:02d}, text tokens": [[1, 2], [2, 1]],
    }
    alone = replace(run, moe=replace(run.moe, top_k=1))
    assert len(all_grids(tally, alone)) == 2  # loads only: no token chooses two


def test_patches_lead_back_to_their_pictures(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path / "run", shapes)
    seen: dict[int, PagePicture] = {}

    def keep(
        report: object, grids: object, pictures: dict[int, PagePicture], **facts: object
    ) -> str:
        seen.update(pictures)
        return ""

    monkeypatch.setattr("pretrain.evaluate.routing.command.routing_page", keep)
    report = routing_command(tmp_path / "run", samples=64)
    wanted = {
        p["sample"] for layer in report["layers"] for e in layer["experts"] for p in e["patches"]
    }
    assert set(seen) == wanted and wanted
    for number, shown in seen.items():
        assert (shown.key, shown.caption) == (shapes.keys[number], shapes.captions[number])
        # Captions say the color: a patch of the picture has pixels of it.
        color = COLORS[shown.caption.split()[2]]
        assert any(
            (crop(shown.image, patch, 16) == color).all(axis=2).sum() > 20 for patch in range(9)
        )


def test_training_shards_and_others_can_be_looked_at(tmp_path: Path, shapes: Shapes) -> None:
    run_folder(tmp_path / "run", shapes)
    assert routing_command(tmp_path / "run", name="train", samples=8)["shards"] == str(
        shapes.folder
    )
    samples: list[dict[str, object]] = [
        {"__key__": str(n), "png": picture(CAPTIONS[n], 48), "txt": "<script>" + CAPTIONS[n]}
        for n in range(4)
    ]
    samples[1]["png"] = b"this is no picture"
    write_shards(samples, tmp_path / "others")
    report = routing_command(
        tmp_path / "run", shards=str(tmp_path / "others"), out=tmp_path / "seen"
    )
    assert (report["pairs"], report["bad_samples"]) == (3, 1)
    assert "<script" not in (tmp_path / "seen" / "routing.html").read_text()
    write_shards([samples[1]], tmp_path / "bad")
    with pytest.raises(
        DataError, match=r"none of the 1 samples .* could be read: \{'bad-image': 1\}"
    ):
        routing_command(tmp_path / "run", shards=str(tmp_path / "bad"))


def test_a_dense_run_and_unknown_sets_are_refused(tmp_path: Path, shapes: Shapes) -> None:
    run = run_folder(tmp_path / "run", shapes, "moe.stop=0")
    with pytest.raises(ConfigError, match=r"no block with experts"):
        routing_command(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no set called 'hold'; it has held, train"):
        find_set(run, "hold")
    with pytest.raises(ConfigError, match="names no held-out set and no training data"):
        find_set(RunConfig(moe=MoEConfig()), "")


def test_the_command_line_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--set", "a", "--shards", "b"], "give one of them"),
        (["--samples", "0"], "--samples is 0, but must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["routing", "run", *words])
        assert message in capsys.readouterr().err
