"""Metrics of short training runs, to show that a code change leaves them bitwise the same.

    python -m tools.golden_run record before.json    # before the change
    python -m tools.golden_run compare before.json   # after it; exit status 1 if anything differs

All cases train the preset `tiny` in fp32 for 20 steps: one process; two processes with expert
parallelism 1 and 2 (ZeRO-1); routing with noise, capacity and biases; a run resumed from its
checkpoint at step 10; and two runs in this process whose expert assignments are hashed at every
step. Results depend on the processor and on package versions: record and compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from data_pipeline.samples import Batch

STEPS = 20
RESUME_STEP = 10
MAX_PRINTED = 40
SIZES = ["model.vocab_size=300", "model.image_size=24", "model.context_length=16"]
"""Settings of every case: few patches and a small vocabulary."""
ROUTING_OPTIONS = [
    "moe.routing=noisy_top_k",
    "moe.capacity_factor=1.0",
    "moe.capacity_priority=batch",
    "balance.bias=zscore",
    "balance.bias_rate=0.01",
    "balance.bias_per_modality=true",
    "balance.importance_weight=0.01",
]
"""Settings of the cases with noise, capacity and biases."""
METRIC_PREFIXES = ("step", "loss/", "optim/", "moe/", "data/samples_seen")
"""Deterministic metrics; times and memory are not recorded."""


def write_data(folder: Path) -> list[str]:
    """Write shards of random images with captions, and a tokenizer; returns the data settings."""
    import cv2
    import numpy as np

    from data_pipeline.preparing.tokenizer_training import train_tokenizer
    from data_pipeline.shards.writer import write_shards

    words = (
        "red green blue small large round square cat dog tree house star boat moon apple".split()
    )
    captions = [f"a {words[n % 15]} {words[n // 15 % 15]} number {n}" for n in range(512)]

    def samples() -> Iterator[dict[str, object]]:
        for n, caption in enumerate(captions):
            pixels = np.random.default_rng(n).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            png = bytes(cv2.imencode(".png", pixels)[1])
            yield {"__key__": f"{n:05d}", "png": png, "txt": caption}

    write_shards(samples(), folder / "shards", samples_per_shard=64)
    train_tokenizer(captions, folder / "tokenizer.model", vocab_size=300)
    return [
        f"data.train=[{folder / 'shards'}]",
        f"data.tokenizer={folder / 'tokenizer.model'}",
        "data.workers=1",
    ]


def train(out: Path, settings: list[str], *, processes: int) -> None:
    """Run `vlmoe train tiny` with `processes` processes on this machine."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={processes}",
        *("-m", "pretrain", "train", "tiny", "--out", str(out)),
        f"schedule.total_steps={STEPS}",
        "schedule.warmup_steps=5",
        "batch.global_batch_size=32",
        "batch.micro_batch_size=8",
        "log.every_steps=1",
        "log.captions_every_steps=0",
        "log.routing_every_steps=0",
        f"checkpoint.every_steps={RESUME_STEP}",
        *settings,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"error: {' '.join(command)} exited with status {done.returncode}:\n"
            f"{done.stderr[-4000:]}"
        )


def run_results(out: Path) -> dict[str, Any]:
    """Deterministic metrics of every step, and a hash of every tensor of the last checkpoint."""
    from safetensors import safe_open

    from pretrain.train.jsonl import METRICS_FILE, read_rows

    rows = [
        {key: value for key, value in row.items() if key.startswith(METRIC_PREFIXES)}
        for row in read_rows(out / METRICS_FILE)
    ]
    tensors = {}
    for path in sorted((out / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                digest = hashlib.sha256(file.get_tensor(name).contiguous().numpy().tobytes())
                tensors[f"{path.name}: {name}"] = digest.hexdigest()[:16]
    return {"rows": rows, "tensors": tensors}


def remove_last_checkpoint(out: Path) -> None:
    """Make the checkpoint of `RESUME_STEP` the latest, as if the run had been killed after it."""
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    (out / "checkpoints" / "latest").write_text(f"step-{RESUME_STEP:08d}\n")


def hash_assignments(settings: list[str]) -> list[str]:
    """Train in this process without DeepSpeed.

    Returns:
        For every step, a hash of the expert assignments of all layers, the loss, and the gradient
        norm.
    """
    import torch

    from pretrain.config.presets import load_run
    from pretrain.model import build_model
    from pretrain.moe import layer as moe_layer
    from pretrain.moe.routing import assign_experts
    from pretrain.parallel.layout import Layout
    from pretrain.parallel.plain_engine import PlainEngine
    from pretrain.train.step import train_step

    batch_settings = ["batch.global_batch_size=16", "batch.micro_batch_size=16"]
    run = load_run("tiny", [*SIZES, *batch_settings, *settings])
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=8
    )
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))
    digest = hashlib.sha256()

    def assign_and_hash(*args: Any, **kwargs: Any) -> Any:
        routing = assign_experts(*args, **kwargs)
        digest.update(routing.expert_ids_N.numpy().tobytes())
        return routing

    rows = []
    with mock.patch.object(moe_layer, "assign_experts", assign_and_hash):
        for step in range(STEPS):
            digest = hashlib.sha256()
            batch = random_batch(step)
            result = train_step(engine, [batch], run, step=step, learning_rate=1e-3)
            total = result.losses["total"]
            rows.append(f"{digest.hexdigest()[:16]} {total!r} {result.grad_norm!r}")
    return rows


def random_batch(step: int) -> Batch:
    """A batch of 16 random pairs, seeded by the step."""
    import torch

    from data_pipeline.samples import Batch
    from pretrain.model.vision_language import valid_positions

    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 17, (16,), generator=generator)
    ids = torch.randint(4, 300, (16, 16), generator=generator)
    images = torch.randint(0, 256, (16, 3, 24, 24), generator=generator).to(torch.uint8)
    rows = torch.arange(16)
    return Batch(
        images=images,
        text_ids=ids * (torch.arange(16) < lengths.unsqueeze(1)),
        text_lengths=lengths,
        text_positions=valid_positions(lengths, 16),
        caption_hashes=rows,
        keys=(),
        captions=(),
        problems=(),
        seconds=0.0,
        ids=16 * step + rows,
        slots=rows,
    )


def measure() -> dict[str, Any]:
    """Run all cases; returns their results by name."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vlmoe-golden-") as folder:
        data = write_data(Path(folder) / "data")
        cases: dict[str, tuple[int, list[str]]] = {
            "one process": (1, []),
            "two processes, EP 1": (2, ["parallel.expert_parallel_size=1"]),
            "two processes, EP 2": (2, ["parallel.expert_parallel_size=2"]),
            "noise, capacity, biases": (2, ["parallel.expert_parallel_size=2", *ROUTING_OPTIONS]),
        }
        for name, (processes, settings) in cases.items():
            out = Path(folder) / name.replace(" ", "-").replace(",", "")
            train(out, [*SIZES, *data, *settings], processes=processes)
            results[name] = run_results(out)
            loss = results[name]["rows"][-1]["loss/total"]
            print(f"{name}: loss {loss!r} after {STEPS} steps", flush=True)

        # The last case again, resumed.
        remove_last_checkpoint(out)
        train(out, [*SIZES, *data, *settings], processes=processes)
        results["noise, capacity, biases, resumed"] = run_results(out)
    results["assignments"] = hash_assignments([])
    results["assignments with noise, capacity, biases"] = hash_assignments(ROUTING_OPTIONS)
    if results["noise, capacity, biases, resumed"] != results["noise, capacity, biases"]:
        print("the resumed run differs from the uninterrupted run", file=sys.stderr)
    return results


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Describe every value that differs, with its path in the JSON file."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from differences(before.get(key), after.get(key), f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{path}/{index}")
    elif before != after:
        yield f"{path}: {before!r} before, {after!r} after"


def main() -> None:
    """Record the results, or compare them with recorded ones."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.golden_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON file of the recorded results")
    options = parser.parse_args()
    if options.action == "record":
        from data_pipeline.common.json_file import write_json

        write_json(options.file, measure(), indent=1)
        return

    before = json.loads(options.file.read_text(encoding="utf-8"))
    after = json.loads(json.dumps(measure()))
    lines = sorted(differences(before, after))
    print("\n".join(lines[:MAX_PRINTED]))
    print(f"{len(lines)} differences in {len(before)} cases")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
