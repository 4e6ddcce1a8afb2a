"""The command line: help everywhere, settings anywhere, errors as one line, and a plan in no
time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.shards.manifest import load_index, load_manifest
from data_pipeline.shards.writer import write_shards
from pretrain.cli.main import build_parser, main

COMMANDS = [
    [],
    ["train"],
    ["plan"],
    ["eval"],
    ["caption"],
    ["routing"],
    ["data"],
    ["data", "index"],
    ["tokenizer"],
    ["tokenizer", "train"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith(" ".join(["usage: vlmoe", *command]))
    is_leaf = command not in ([], ["data"], ["tokenizer"])
    assert ("examples:" in text) == is_leaf


def test_the_examples_of_the_help_are_command_lines_that_parse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = 0
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  vlmoe "):
                build_parser().parse_known_args(line.split()[1:])
                seen += 1
    assert seen >= 12


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "tiny", "--world-size", "2", "optim.lr=2e-3", "--json", "seed=4"],
        ["plan", "tiny", "optim.lr=2e-3", "seed=4", "--json", "--world-size", "2"],
        ["plan", "--json", "--world-size", "2", "tiny", "optim.lr=2e-3", "seed=4"],
    ],
)
def test_settings_may_stand_before_and_after_options(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["world_size"] == 2
    assert main([*words, "optim.lr=-1"]) == 2
    assert "optim.lr is -1.0" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "moe.experts_per_tokn=2"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.endswith("moe.experts_per_tokn: no such setting; did you mean 'top_k'?\n")


def test_training_tells_a_mistake_in_the_run_before_it_makes_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny", "--out", str(tmp_path / "run"), "optim.lrr=1"]) == 2
    assert "optim.lrr: no such setting; did you mean 'lr'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_rank_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["plan", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): nosuch: no such file")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nosuch"],
        ["train", "tiny"],
        ["plan", "tiny", "--nosuch"],
        ["plan", "tiny", "--world-size", "0"],
        ["plan", "tiny", "--wor", "2"],
        ["eval", "x", "y"],
        ["eval", "run", "--labels", "x"],
    ],
)
def test_wrong_words_get_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vlmoe")


@pytest.mark.parametrize(
    ("preset", "world_size"), [("tiny", 2), ("s16", 8), ("b16", 64), ("l16", 64), ("h14", 64)]
)
def test_a_plan_names_all_its_numbers(
    preset: str, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", preset, "--world-size", str(world_size), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    batch, layout = facts["batch"], facts["layout"]
    assert (
        batch["micro_batch_size"] * world_size * batch["accumulation_steps"]
        == batch["global_batch_size"]
    )
    assert layout["expert_copies"] * layout["expert_parallel_size"] == world_size
    assert facts["params"]["total"] > facts["params"]["active"] > facts["params"]["trunk_active"]
    assert facts["deepspeed"]["train_batch_size"] == batch["global_batch_size"]
    assert facts["flops_per_pair"]["training"] == pytest.approx(
        3 * facts["flops_per_pair"]["forward"], abs=3
    )


def test_a_plan_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "b16", "--world-size", "16", "parallel.expert_parallel_size=8"]) == 0
    text = capsys.readouterr().out
    for part in (
        "461.5M total, 85.22M active per token",
        "16,384 pairs a step = 256 a forward pass x 16 ranks x 4",
        "4 experts of each layer a rank, 2 copies of the experts, on ranks 0-7, 8-15",
        '"stage": 1',
        "ds_configs/zero1.json",
    ):
        assert part in text


def test_a_plan_without_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "parallel.engine=plain"]) == 0
    assert "not used (parallel.engine is plain)" in capsys.readouterr().out


def test_a_plan_tells_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["plan", "tiny", "--world-size", "3", "parallel.expert_parallel_size=16", "optim.lr=0"]
        )
        == 2
    )
    text = capsys.readouterr().err
    assert (
        "3 problems:" in text
        and "more ranks than the 8 experts" in text
        and "the nearest that is" in text
    )


def test_a_plan_loads_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from pretrain.cli.main import main; status = main(['plan', 'h14', '--world-size', '64']); "
        "print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules]); sys.exit(status)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_python_m_pretrain_is_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pretrain", "plan", "tiny"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0 and "5.215M total" in found.stdout


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with two shards of three captioned samples, as another program would leave them."""
    samples = [
        {
            "__key__": f"k{i}",
            "png": b"x",
            "txt": f"a red bird number {i}",
            "json": {"tags": ["bird", "red"]},
        }
        for i in range(6)
    ]
    write_shards(samples, tmp_path / "shards", samples_per_shard=3, about={"license": "MIT"})
    return tmp_path / "shards"


def test_indexing_makes_the_manifest_that_the_writer_makes(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (shards / "manifest.json").read_bytes()
    for index in shards.glob("*.index.json"):
        index.unlink()
    assert main(["data", "index", *map(str, sorted(shards.glob("*.tar")))]) == 0
    assert "2 shards, 6 samples" in capsys.readouterr().out
    assert (shards / "manifest.json").read_bytes() == written  # the license is kept, too
    (shards / "manifest.json").unlink()
    assert main(["data", "index", str(shards)]) == 0
    assert json.loads((shards / "manifest.json").read_text())["total_samples"] == 6


def test_indexing_needs_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(tmp_path)]) == 2
    assert "no shards at" in capsys.readouterr().err


def test_indexing_a_truncated_shard_names_it(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = min(shards.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1500])
    assert main(["data", "index", str(shards)]) == 2
    assert str(shard) in capsys.readouterr().err


def test_a_tokenizer_is_trained_on_all_captions_that_were_asked_for(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.model"
    words = ["tokenizer", "train", str(shards), "--out", str(out), "--vocab-size", "277"]
    assert main([*words, "--caption-key", "txt", "--caption-key", "json:tags"]) == 0
    assert f"{out}: 277 pieces, fingerprint " in capsys.readouterr().out
    tokenizer = Tokenizer.load(out)
    assert tokenizer.decode(tokenizer.encode("a red bird", 64)) == "a red bird"
    assert (
        main(["tokenizer", "train", str(shards), "--out", str(out), "--vocab-size", "32000"]) == 2
    )
    assert "too little text for 32000 pieces" in capsys.readouterr().err


def test_the_corpus_names_a_damaged_sample_and_goes_on(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = load_manifest(shards)
    assert list(captions_of([manifest], ["txt"])) == [f"a red bird number {i}" for i in range(6)]
    assert list(captions_of([manifest], ["json:tags", "txt"]))[:3] == [
        "bird",
        "red",
        "a red bird number 0",
    ]
    index = load_index(manifest, manifest.shards[0])
    shard = shards / manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    data[int(index.offsets[1]) + 512] ^= 1
    shard.write_bytes(data)
    assert list(captions_of([manifest], ["txt"])) == [
        f"a red bird number {i}" for i in (0, 2, 3, 4, 5)
    ]
    assert "left out k1 of" in caplog.text and "crc-mismatch" in caplog.text
    assert "1 of 6 samples were damaged" in caplog.text


def test_a_plan_tells_how_tokens_are_routed_and_balanced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(["plan", "quickstart"]) == 0
    )  # without --world-size as many ranks as share the experts
    told = capsys.readouterr().out
    assert "64 a forward pass x 2 ranks" in told
    assert "routing      softmax scores, choice topk, renormalized, dropless\n" in told
    assert "balancing    sign bias of each modality, rate 0.001\n" in told
    assert (
        main(
            [
                "plan",
                "tiny",
                "moe={pools: modality, capacity_factor: 1.5, top_k: 1}",
                "balance={local_entropy_weight: {text: 0.01}, balance_weight: 0}",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "raw weights, capacity 1.5 by position, 4 experts for patches\n" in told
    assert "balancing    router_z 0.001, local_entropy text 0.01\n" in told
    assert main(["plan", "tiny", "moe.stop=0"]) == 0
    assert "experts" not in capsys.readouterr().out.split("layout")[0].replace("with experts", "")
