"""Numbers of short training runs, to show that a change of the code leaves them bitwise the same.

    python -m tools.golden_run record before.json       # on the code before the change
    python -m tools.golden_run compare before.json      # after it: every difference, exit status 1 if there is one

Cases, all of the preset `tiny` in fp32 for 20 steps: one process; two processes with expert parallelism 1 and 2
(ZeRO-1); routing with noise, capacity and biases; a run resumed from its checkpoint of step 10; and, in this process,
two runs whose expert assignments are hashed at every step. Numbers depend on the processor and on the versions of
the packages: record and compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 20
RESUME_AT = 10
SIZES = ["model.vocab_size=300", "model.image_size=24", "model.context_length=16"]
"""Settings of every case: `tiny` with few patches and a small vocabulary."""
OPTIONS = [
    "moe.routing=noisy_top_k", "moe.capacity_factor=1.0", "moe.capacity_priority=batch", "balance.bias=zscore",
    "balance.bias_rate=0.01", "balance.bias_per_modality=true", "balance.importance_weight=0.01",
]  # fmt: skip
"""Settings of the cases with every kind of routing state."""


def write_data(folder: Path) -> list[str]:
    """Write shards of random pictures with captions, and a tokenizer; the settings that read them."""
    import cv2
    import numpy as np

    from data_pipeline.content.tokenizer import train_tokenizer
    from data_pipeline.shards.writer import write_shards

    words = (
        "red green blue small large round square cat dog tree house star boat moon apple".split()
    )
    captions = [f"a {words[n % 15]} {words[n // 15 % 15]} number {n}" for n in range(512)]

    def samples() -> Iterator[dict[str, object]]:
        for n, caption in enumerate(captions):
            pixels = np.random.default_rng(n).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            yield {
                "__key__": f"{n:05d}",
                "png": bytes(cv2.imencode(".png", pixels)[1]),
                "txt": caption,
            }

    write_shards(samples(), folder / "shards", samples_per_shard=64)
    train_tokenizer(captions, folder / "tokenizer.model", vocab_size=300)
    return [
        f"data.train=[{folder / 'shards'}]",
        f"data.tokenizer={folder / 'tokenizer.model'}",
        "data.workers=1",
    ]


def train(out: Path, settings: list[str], *, processes: int) -> None:
    """Run `vlmoe train tiny` on so many processes of this machine."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
        "pretrain", "train", "tiny", "--out", str(out), f"schedule.total_steps={STEPS}", "schedule.warmup_steps=5",
        "batch.global_batch_size=32", "batch.micro_batch_size=8", "log.every_steps=1", "log.captions_every_steps=0",
        "log.routing_every_steps=0", f"checkpoint.every_steps={RESUME_AT}", *settings,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )


def numbers(out: Path) -> dict[str, Any]:
    """What a run gave: rows of its metrics without times and memory, and a hash of every tensor it saved."""
    from safetensors import safe_open

    from pretrain.train.journal import read_rows

    kept = ("step", "loss/", "optim/", "moe/", "data/samples_seen")
    rows = [
        {key: value for key, value in row.items() if key.startswith(kept)}
        for row in read_rows(out / "metrics.jsonl")
    ]
    tensors = {}
    for path in sorted((out / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                digest = hashlib.sha256(file.get_tensor(name).contiguous().numpy().tobytes())
                tensors[f"{path.name}: {name}"] = digest.hexdigest()[:16]
    return {"rows": rows, "tensors": tensors}


def resume(out: Path) -> None:
    """Make the checkpoint of step 10 the newest one, as if the run had been killed after it."""
    import shutil

    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    (out / "checkpoints" / "latest").write_text(f"step-{RESUME_AT:08d}\n")


def assignments(settings: list[str]) -> list[str]:
    """Hash of the expert of every token in every layer, a row a step: 20 steps of one process without DeepSpeed."""
    import torch

    from data_pipeline.samples import Batch
    from pretrain.config.presets import load_run
    from pretrain.model import build_model
    from pretrain.model.vision_language import valid_positions
    from pretrain.moe import layer as moe_layer
    from pretrain.parallel.layout import Layout
    from pretrain.parallel.plain_engine import PlainEngine
    from pretrain.train.step import train_step

    run = load_run(
        "tiny", [*SIZES, "batch.global_batch_size=16", "batch.micro_batch_size=16", *settings]
    )
    device = torch.device("cpu")
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=8
    )
    engine = PlainEngine(build_model(run), run.optim, layout, device)
    choose, rows = moe_layer.choose, []

    def hashed(*args: Any, **settings: Any) -> Any:
        routing = choose(*args, **settings)
        digest.update(routing.expert_ids_N.numpy().tobytes())
        return routing

    moe_layer.choose = hashed
    try:
        for step in range(STEPS):
            digest = hashlib.sha256()
            drawn = torch.Generator().manual_seed(step)
            lengths = torch.randint(4, 17, (16,), generator=drawn)
            ids = torch.randint(4, 300, (16, 16), generator=drawn)
            images = torch.randint(0, 256, (16, 3, 24, 24), generator=drawn).to(torch.uint8)
            rows_B = torch.arange(16)
            batch = Batch(
                images, ids * (torch.arange(16) < lengths.unsqueeze(1)), lengths, valid_positions(lengths, 16),
                rows_B, (), (), (), 0.0, 16 * step + rows_B, rows_B,
            )  # fmt: skip
            result = train_step(engine, [batch], run, step=step, learning_rate=1e-3)
            rows.append(
                f"{digest.hexdigest()[:16]} {result.losses['total']!r} {result.grad_norm!r}"
            )
    finally:
        moe_layer.choose = choose
    return rows


def measure() -> dict[str, Any]:
    """Numbers of every case, by its name."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vlmoe-golden-") as folder:
        data = write_data(Path(folder) / "data")
        cases: dict[str, tuple[int, list[str]]] = {
            "one process": (1, []),
            "two processes, EP 1": (2, ["parallel.expert_parallel_size=1"]),
            "two processes, EP 2": (2, ["parallel.expert_parallel_size=2"]),
            "noise, capacity, biases": (2, ["parallel.expert_parallel_size=2", *OPTIONS]),
        }
        for name, (processes, settings) in cases.items():
            out = Path(folder) / name.replace(" ", "-").replace(",", "")
            train(out, [*SIZES, *data, *settings], processes=processes)
            measured[name] = numbers(out)
            print(
                f"{name}: loss {measured[name]['rows'][-1]['loss/total']!r} after {STEPS} steps",
                flush=True,
            )
        resume(out)
        train(out, [*SIZES, *data, *settings], processes=processes)
        measured["noise, capacity, biases, resumed"] = numbers(out)
    measured["assignments"] = assignments([])
    measured["assignments with noise, capacity, biases"] = assignments(OPTIONS)
    if measured["noise, capacity, biases, resumed"] != measured["noise, capacity, biases"]:
        print("the resumed run differs from the run without an interruption", file=sys.stderr)
    return measured


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Every value that is not the same in both, by its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from differences(before.get(key), after.get(key), f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where}/{index}")
    elif before != after:
        yield f"{where}: {before!r} before, {after!r} now"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON file of the recorded numbers")
    options = parser.parse_args()
    if options.action == "record":
        options.file.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(options.file.read_text(encoding="utf-8"))
    after = json.loads(json.dumps(measure()))
    found = sorted(differences(before, after))
    print("\n".join(found[:40]))
    print(f"{len(found)} differences in {len(before)} cases")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
