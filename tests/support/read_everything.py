"""Reads all samples of a folder of shards, for evaluation and in one epoch of training, and
reports.

    python -m tests.support.read_everything FOLDER TOKENIZER

Prints one line of JSON: for both ways the number of good samples and the others by reason, and the
most memory that this process took, in MiB.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
from collections import Counter
from collections.abc import Iterable

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.loading.sources import plain_source
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import load_manifest


def main(folder: str, tokenizer_path: str) -> None:
    """Read, count and print."""
    manifest = load_manifest(folder)
    data = DataConfig(
        caption_keys=("txt", "json:caption"),
        caption_weights=(1.0, 1.0),
        workers=0,
        fetch_ahead=0,
        augment=AugmentConfig(crop_scale=(0.5, 1.0), affine_degrees=10, brightness=0.2),
    )
    total = manifest.total_samples
    everything = read_all(
        manifest,
        tokenizer=Tokenizer.load(tokenizer_path),
        data=data,
        image_size=32,
        context_length=16,
        micro_batch_size=8,
    )
    report: dict[str, object] = {"samples": total, "evaluation": tally(everything)}
    loader = Loader(
        sources=[plain_source(manifest)],
        tokenizer_path=tokenizer_path,
        data=data,
        image_size=32,
        context_length=16,
        seed=0,
        rank=0,
        world_size=1,
        global_batch_size=1,
        micro_batch_size=1,
        state=LoaderState(),
    )
    steps = itertools.islice(loader.steps(), total)
    report["training"] = tally(batch for batches, _ in steps for batch in batches)
    loader.close()
    report["most_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(report))


def tally(batches: Iterable[Batch]) -> dict[str, int]:
    """Samples by what became of them."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts["good"] += len(batch.keys)
        counts.update(problem.reason for problem in batch.problems)
    return dict(counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
