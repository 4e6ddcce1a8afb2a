"""What a person sees for each kind of bad input: status 2, one clear error, and no traceback.

Every error is checked for what was found, where, and what to do. Bad samples are no error: the run
goes on, names and counts them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.content.tokenizer import train_tokenizer
from tests.support.commands import Command, command_server
from tests.support.launch import LaunchResult, run_ranks, torchrun
from tests.support.ports import free_ports
from tests.support.processes import environments
from tests.support.shards import CAPTIONS, Shapes, picture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

_MODEL = [
    *(
        "model.width=32",
        "model.num_layers=2",
        "model.fusion_layer=1",
        "model.num_heads=2",
        "model.ffn_width=32",
    ),
    *("model.image_size=16", "model.context_length=16", "model.embed_dim=16", "model.pool_heads=2"),
    *("moe.num_experts=4", "moe.expert_width=16", "moe.shared_experts=0", "schedule.total_steps=4"),
    *(
        "batch.global_batch_size=8",
        "batch.micro_batch_size=4",
        "schedule.warmup_steps=1",
        "data.workers=0",
    ),
    *(
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        "log.captions_every_steps=0",
        "data.timeout_seconds=60",
    ),
    "data.shard_seconds=20",
]
_PLAIN = [*_MODEL, "parallel.engine=plain"]
_FOREVER = ["schedule.total_steps=1000000", "checkpoint.every_steps=0", "log.every_steps=10"]


@pytest.fixture(scope="module")
def vlmoe() -> Iterator[Command]:
    with command_server() as command:
        yield command


@dataclass(frozen=True, kw_only=True)
class Place:
    """A copy of the shards to damage, and a run folder to train in."""

    vlmoe: Command
    folder: Path
    out: Path
    tokenizer: Path

    def settings(self, *more: str) -> list[str]:
        data = [
            f"data.train=['{self.folder}']",
            f"data.tokenizer={self.tokenizer}",
            "model.vocab_size=288",
        ]
        return ["train", "tiny", "--out", str(self.out), *data, *more]

    def train(self, *more: str, timeout_seconds: float = 60.0, **env: str | None) -> LaunchResult:
        """Train here, in one process."""
        return self.vlmoe(self.settings(*_PLAIN, *more), timeout_seconds=timeout_seconds, env=env)

    def refused(self, *more: str, **env: str) -> str:
        """Train here, and give the one error."""
        return one_error(self.train(*more, **env))

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.tar"

    def steps(self) -> list[int]:
        return [row["step"] for row in _rows(self.out / "metrics.jsonl")]


@pytest.fixture
def place(vlmoe: Command, shapes: Shapes, tmp_path: Path) -> Place:
    shutil.copytree(shapes.folder, tmp_path / "shards")
    return Place(
        vlmoe=vlmoe, folder=tmp_path / "shards", out=tmp_path / "run", tokenizer=shapes.tokenizer
    )


@pytest.fixture(scope="module")
def trained_folder(
    vlmoe: Command, shapes: Shapes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of four steps with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("trained") / "run"
    vlmoe(["train", "tiny", "--out", str(out), *_PLAIN, *shapes.overrides]).check()
    return out


@pytest.fixture
def trained(trained_folder: Path, place: Place) -> Place:
    """A place whose run folder is a copy of a trained one."""
    shutil.copytree(trained_folder, place.out)
    return place


def one_error(result: LaunchResult, *, rank: str = "") -> str:
    """The only error in an output, on one line; `torchrun` may add its own summary below it."""
    own, launcher = _without_launcher(result.output)
    statuses = (2,) if not launcher else (1,)
    assert result.returncodes == statuses, (
        f"status {result.returncodes} after {result.seconds:.0f} s:\n{own[-3000:]}"
    )
    assert "Traceback" not in own, own[-3000:]
    blocks = re.findall(r"^error.*\n(?:  .*\n)*", own, flags=re.MULTILINE)
    assert len(blocks) == 1, own[-3000:]
    assert own.endswith(blocks[0]), f"something stands below the error:\n{own[-3000:]}"
    head = f"error{f' ({rank})' if rank else ''}: "
    assert blocks[0].startswith(head), blocks[0]
    return " ".join(blocks[0].removeprefix(head).split())


def _without_launcher(output: str) -> tuple[str, str]:
    """What our processes wrote, and what torchrun wrote after them."""
    found = re.search(
        r"^[WE]\d{4} [0-9:.]+ \d+ .*torch/distributed/elastic", output, flags=re.MULTILINE
    )
    return (output, "") if found is None else (output[: found.start()], output[found.start() :])


def says(message: str, *parts: str) -> None:
    """Assert that a message holds every part."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Settings: told before torch is loaded, and before a folder is made.


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        (
            "moe.experts_per_tokn=3",
            [
                "tiny.yaml",
                "moe.experts_per_tokn: no such setting",
                "did you mean 'top_k'?",
            ],
        ),
        (
            "batch.global_batch_size=7",
            [
                "batch.global_batch_size is 7",
                "batch.micro_batch_size (4) x 1 ranks",
                "batch.global_batch_size=8, or batch.micro_batch_size=1",
            ],
        ),
        (
            "parallel.expert_parallel_size=8",
            [
                "parallel.expert_parallel_size is 8",
                "more ranks than the 4 experts",
                "use at most 1 with 1 ranks",
            ],
        ),
        (
            "parallel.expert_parallel_size=3",
            ["does not divide moe.num_experts (4)", "possible: 1, 2, 4"],
        ),
        ("data.train=[]", ["data.train is empty; name the manifests"]),
    ],
)
def test_a_wrong_setting(place: Place, setting: str, parts: list[str]) -> None:
    says(place.refused(setting), *parts)
    assert not place.out.exists()


def test_an_unknown_preset(vlmoe: Command, tmp_path: Path) -> None:
    says(
        one_error(vlmoe(["train", "tinny", "--out", str(tmp_path / "run")])),
        "tinny: no such file",
        "no preset",
        "did you mean 'tiny'?",
    )


def test_more_ranks_than_experts_is_told_once(place: Place) -> None:
    words = ["-m", "pretrain", *place.settings(*_MODEL, "parallel.expert_parallel_size=8")]
    result = torchrun(words, processes=2, timeout_seconds=60)
    says(
        one_error(result, rank="rank 0"), "more ranks than the 4 experts", "at most 2 with 2 ranks"
    )


# Shards and their manifest.


def test_no_manifest(place: Place) -> None:
    (place.folder / "manifest.json").unlink()
    named = f"data.train=['{place.folder}/manifest.json']"
    says(
        place.refused(named),
        f"no manifest of shards: cannot read {place.folder}/manifest.json",
        f"make it with `vlmoe data index {place.folder}`",
    )
    result = place.train().check()
    says(result.output, f"{place.folder} has no manifest: its shards are read once from end to end")


def test_too_many_missing_shards(place: Place) -> None:
    place.shard(1).unlink()
    place.shard(2).unlink()
    says(
        place.refused(),
        f"shard {place.shard(1)} is missing",
        "expects 16 samples",
        "copy it again",
        "2 of 4 shards are missing, with 32 of 64 samples",
        "more than data.max_corrupt_ratio 0.01",
    )
    assert not (place.out / "checkpoints").exists()


def test_few_missing_shards_are_left_out(place: Place) -> None:
    place.shard(1).unlink()
    result = place.train("data.max_corrupt_ratio=0.5", "schedule.total_steps=16").check()
    assert (
        "1 of 4 shards are missing, with 16 of 64 samples: their samples are left out"
        in result.output
    )
    rows = _rows(place.out / "bad_samples.jsonl")
    assert {(row["shard"], row["reason"]) for row in rows} == {
        ("shard-000001.tar", "missing-shard")
    }
    assert _rows(place.out / "metrics.jsonl")[-1]["data/samples_seen"] == 128 - len(rows)


def test_a_truncated_shard_costs_the_samples_beyond_its_end(place: Place) -> None:
    size = place.shard(1).stat().st_size
    os.truncate(place.shard(1), size // 2)
    result = place.train("data.max_corrupt_ratio=0.5", "schedule.total_steps=8").check()
    assert (
        f"shard {place.shard(1)} has {size // 2} bytes, but its manifest expects {size}"
        in result.output
    )
    rows = _rows(place.out / "bad_samples.jsonl")
    assert {(row["shard"], row["reason"]) for row in rows} == {("shard-000001.tar", "truncated")}
    assert 4 <= len(rows) <= 12


def test_a_flipped_bit_costs_one_sample(place: Place) -> None:
    _damage(place.shard(2), 3000)
    place.train("schedule.total_steps=8").check()
    (row,) = _rows(place.out / "bad_samples.jsonl")
    assert (row["shard"], row["reason"]) == ("shard-000002.tar", "crc-mismatch")
    says(str(row["detail"]), "CRC-32", "but the index expects")


def test_one_rank_alone_meets_a_damaged_sample(place: Place) -> None:
    """The other ranks go on with it, and all end together."""
    _damage(place.shard(2), 3000)
    words = [
        "-m",
        "pretrain",
        *place.settings(*_MODEL, "parallel.expert_parallel_size=2", "schedule.total_steps=8"),
    ]
    torchrun(words, processes=2, timeout_seconds=60).check()
    assert [row["reason"] for row in _rows(place.out / "bad_samples.jsonl")] == ["crc-mismatch"]


def test_bad_samples_are_left_out_named_and_counted(place: Place) -> None:
    place.shard(0).parent.joinpath("manifest.json").unlink()
    for old in place.folder.glob("shard-*"):
        old.unlink()
    bad = _write_mixed_shard(place.folder / "mixed.tar")
    assert place.vlmoe(["data", "index", str(place.folder)]).check()
    result = place.train().check()
    rows = _rows(place.out / "bad_samples.jsonl")
    assert {row["key"]: row["reason"] for row in rows} == bad
    assert {row["shard"] for row in rows} == {"mixed.tar"}
    details = {str(row["key"]): str(row["detail"]) for row in rows}
    says(details["03"], "no caption under txt; it has png")
    says(details["05"], "begins with b'this is a te', which is no JPEG, PNG")
    metrics = _rows(place.out / "metrics.jsonl")[-1]
    assert metrics["data/bad/no-caption"] == 2 and metrics["data/bad/bad-image"] == 2
    assert metrics["data/samples_seen"] == 32 - len(bad)
    assert "mixed.tar, sample" in result.output and "named in bad_samples.jsonl" in result.output


def _write_mixed_shard(path: Path) -> dict[str, str]:
    """32 samples as another program would write them; gives the reason of each bad one."""
    reasons = {
        "03": "no-caption",
        "05": "bad-image",
        "07": "no-image",
        "09": "no-caption",
        "11": "bad-image",
    }
    with tarfile.open(path, "w") as archive:
        for number in range(32):
            key, caption = f"{number:02d}", CAPTIONS[number]
            image = picture(caption, 24)
            files = {"png": image, "txt": caption.encode()}
            match key:
                case "03":
                    del files["txt"]
                case "05":
                    files = {"jpg": b"this is a text file\n", "txt": caption.encode()}
                case "07":
                    del files["png"]
                case "09":
                    files["txt"] = b" \n"
                case "11":
                    files["png"] = image[: len(image) // 2]
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return reasons


def _damage(path: Path, at: int) -> None:
    """Change one bit; the length stays."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# Stores.


_KEYS = {"AWS_ACCESS_KEY_ID": "AKIANOBODY", "AWS_SECRET_ACCESS_KEY": "very-secret-words"}


def test_a_store_without_credentials(place: Place) -> None:
    (port,) = free_ports(1)
    # Away from the address of a cloud's own service, which this machine may have.
    env = dict.fromkeys(_KEYS) | {"AWS_METADATA_ENDPOINT": f"http://127.0.0.1:{port}"}
    result = place.train(
        "data.train=[s3://bucket/pairs]", "data.timeout_seconds=5", "data.shard_seconds=4", **env
    )
    says(
        one_error(result),
        "cannot read s3://bucket/pairs/manifest.json",
        "no credentials were found",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )
    assert result.seconds < 30


@pytest.mark.parametrize("silent", [False, True])
def test_a_store_that_cannot_be_reached(place: Place, silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()  # takes connections and never answers
        env = _KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        result = place.train(
            "data.train=[s3://bucket/pairs]",
            "data.timeout_seconds=2",
            "data.shard_seconds=1",
            **env,
        )
    says(
        one_error(result),
        "cannot read s3://bucket/pairs/manifest.json",
        "did not answer in time" if silent else "cannot be reached",
        "network",
    )
    assert result.seconds < 30
    assert "very-secret" not in result.output and "AKIANOBODY" not in result.output


# The tokenizer.


def test_no_tokenizer(place: Place) -> None:
    missing = place.out.parent / "nothing.model"
    says(
        place.refused(f"data.tokenizer={missing}"),
        f"cannot read the tokenizer {missing}",
        "`vlmoe tokenizer train`",
    )


def test_a_file_that_is_no_tokenizer(place: Place) -> None:
    says(
        place.refused(f"data.tokenizer={place.folder}/manifest.json"),
        "manifest.json is not a SentencePiece model",
        "`vlmoe tokenizer train`",
    )


def test_a_tokenizer_of_another_size(place: Place) -> None:
    says(
        place.refused("model.vocab_size=300"),
        "model.vocab_size is 300",
        str(place.tokenizer),
        "has 288 pieces",
        "set model.vocab_size=288",
    )


def test_a_run_folder_trained_with_another_tokenizer(trained: Place) -> None:
    other, as_large = trained.out.parent / "other.model", trained.out.parent / "as-large.model"
    train_tokenizer(CAPTIONS, other, vocab_size=284)
    train_tokenizer(CAPTIONS[:50], as_large, vocab_size=288)
    kept = _contents(trained.out)
    says(
        trained.refused(f"data.tokenizer={other}", "model.vocab_size=284"),
        f"{trained.out} was trained with another tokenizer",
        str(other),
        f"Set data.tokenizer={trained.out}",
    )
    assert _contents(trained.out) == kept
    (trained.out / "tokenizer.model").unlink()
    says(
        trained.refused("schedule.total_steps=6", f"data.tokenizer={as_large}"),
        "step-00000004 was trained with another tokenizer",
        str(as_large),
        "Give the run its own",
    )


# Going on from a checkpoint.


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        (
            "model.width=64",
            [
                "the checkpoint has",
                "as [32",
                "this run's model needs [64",
                "Set the model, moe and balance sections",
                "config.yaml of the run folder",
            ],
        ),
        (
            "model.num_layers=3",
            ["the checkpoint has no 'blocks.2.", "config.yaml of the run folder"],
        ),
        ("moe.num_experts=8", ["another layout: num_experts 4 (now 8)", "set moe.num_experts=4"]),
        ("seed=7", ["seed is 7", "saved with seed 0", "set seed back"]),
        (
            "parallel.engine=deepspeed",
            ["another layout: zero_stage -1 (now 1)", "set parallel.engine=plain"],
        ),
    ],
)
def test_a_changed_run(trained: Place, setting: str, parts: list[str]) -> None:
    kept = _contents(trained.out)
    says(trained.refused("schedule.total_steps=6", setting), *parts)
    assert _contents(trained.out) == kept, "a refused start changed the run folder"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained: Place) -> None:
    weights = trained.out / "checkpoints" / "step-00000004" / "model-00000.safetensors"
    _damage(weights, weights.stat().st_size - 500)
    result = trained.train("schedule.total_steps=6").check()
    assert f"{weights} has SHA-256" in result.output and "step-00000002: step 2," in result.output
    assert trained.steps() == [1, 2, 3, 4, 5, 6]


def test_no_whole_checkpoint(trained: Place) -> None:
    for weights in trained.out.glob("checkpoints/*/model-00000.safetensors"):
        os.truncate(weights, 100)
    says(
        trained.refused("schedule.total_steps=6"),
        f"no checkpoint in {trained.out}/checkpoints is whole",
        "move the folder away",
    )


def _contents(out: Path) -> dict[str, bytes]:
    """Every file of a run folder that training reads again."""
    names = [*out.glob("*.*"), *out.glob("checkpoints/**/*")]
    return {str(path): path.read_bytes() for path in names if path.is_file()}


# The disk.


def test_a_run_folder_that_cannot_be(place: Place) -> None:
    place.out.write_text("a file")
    says(
        place.refused(),
        f"cannot write into the run folder {place.out}",
        "File exists",
        "choose another --out",
    )


def test_a_full_disk_during_save(place: Place, trained_folder: Path) -> None:
    checkpoints = place.out / "checkpoints"
    checkpoints.mkdir(parents=True)
    with _small_disk(checkpoints, "1m"):
        place.train("schedule.total_steps=2", "schedule.warmup_steps=1").check()
        filler = checkpoints / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        message = place.refused()
        says(
            message,
            "checkpoint of step 4 was not saved",
            "No space left on device",
            "MiB free",
            "free some",
            f"{checkpoints}/step-00000002 is untouched and good",
        )
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            "filler",
            "latest",
            "step-00000002",
        ]
        filler.unlink()
        result = place.train().check()
        assert "resumed from" in result.output and "step-00000002: step 2," in result.output
        assert (checkpoints / "latest").read_text().strip() == "step-00000004"
    assert place.steps() == [1, 2, 3, 4]


def test_a_disk_that_fills_up_while_training(place: Place) -> None:
    place.out.mkdir()
    with _small_disk(place.out, "300k"):
        result = place.train("schedule.total_steps=150", "checkpoint.every_steps=0")
        says(one_error(result), "checkpoint of step 150 was not saved", "No space left on device")
        says(
            result.output,
            "cannot write metrics.jsonl any more (No space left on device); training goes on",
        )
        assert result.output.count("training goes on without it") == 2  # TensorBoard's files, too


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Commands that use a trained run.


def test_eval_of_a_folder_that_is_no_run(vlmoe: Command, tmp_path: Path) -> None:
    says(
        one_error(vlmoe(["eval", str(tmp_path)])),
        f"{tmp_path} is not the folder of a run",
        "no config.yaml",
    )


def test_a_caption_for_something_that_is_no_picture(
    vlmoe: Command, trained_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.jpg").write_text("hello")
    (tmp_path / "good.png").write_bytes(picture(CAPTIONS[0], 24))
    words = [
        "caption",
        str(trained_folder),
        *(str(tmp_path / name) for name in ("note.jpg", "good.png", "no.png")),
    ]
    result = vlmoe(words)
    says(
        one_error(result),
        "2 of 3 pictures could not be read",
        "note.jpg: the picture cannot be decoded",
        "no.png: No such file or directory",
    )
    assert f"{tmp_path}/good.png: " in result.output, "the good picture got no caption"


# Being stopped, and losing a rank.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(place: Place, number: signal.Signals) -> None:
    # Whatever is started in the background by a shell ignores Ctrl-C, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    words = ["-m", "pretrain", *place.settings(*_PLAIN, *_FOREVER)]
    try:
        result, _ = _signalled(
            lambda env: run_ranks(words, processes=1, timeout_seconds=60, env=env),
            place.out,
            rank=0,
            number=number,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    result.check()
    assert "Traceback" not in result.output and "asked to stop: saved step" in result.output
    saved = (place.out / "checkpoints" / "latest").read_text().strip()
    assert int(saved.removeprefix("step-")) == place.steps()[-1] > 0


def test_a_rank_that_dies_takes_the_other_with_it(place: Place) -> None:
    words = [
        "-m",
        "pretrain",
        *place.settings(*_MODEL, *_FOREVER, "parallel.expert_parallel_size=2"),
    ]
    result, seconds = _signalled(
        lambda env: torchrun(words, processes=2, timeout_seconds=60, env=env),
        place.out,
        rank=1,
        number=signal.SIGKILL,
    )
    assert not result.timed_out and seconds < 10
    own, launcher = _without_launcher(result.output)
    assert "Traceback" not in own and "exitcode  : -9" in launcher


def _signalled(
    launch: Callable[[dict[str, str]], LaunchResult],
    out: Path,
    *,
    rank: int,
    number: signal.Signals,
) -> tuple[LaunchResult, float]:
    """Send a rank a signal when it trains; the result, and the seconds from the signal to the
    end."""
    mark = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch, {"BAD_INPUT_TEST": mark})
        metrics = out / "metrics.jsonl"
        while not launched.done() and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        os.kill(_process({f"BAD_INPUT_TEST={mark}", f"RANK={rank}"}), number)
        sent = time.monotonic()
        return launched.result(), time.monotonic() - sent


def _process(variables: Sequence[str] | set[str]) -> int:
    """Id of the one process that was started with all these variables."""
    (process,) = [number for number, found in environments() if set(variables) <= found]
    return process
