"""Reads all samples of a folder of shards, for evaluation and for one epoch of training.

    python -m tests.support.read_all_samples FOLDER TOKENIZER

Prints one JSON line: for both, the number of usable samples and of others by reason, and the peak
memory of this process in MiB.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
from collections import Counter
from collections.abc import Iterable

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.loading.sources import unweighted_source
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import load_manifest


def main(folder: str, tokenizer_path: str) -> None:
    """Read all samples and print the report."""
    manifest, tokenizer = load_manifest(folder), Tokenizer.load(tokenizer_path)
    data = DataConfig(
        caption_keys=("txt", "json:caption"),
        caption_weights=(1.0, 1.0),
        workers=0,
        fetch_ahead=0,
        augment=AugmentConfig(crop_scale=(0.5, 1.0), affine_degrees=10, brightness=0.2),
    )
    total = manifest.total_samples
    batches = read_all(
        manifest,
        tokenizer=tokenizer,
        data=data,
        batch=BatchSpec(
            image_size=32,
            context_length=16,
            micro_batch_size=8,
        ),
    )
    report: dict[str, object] = {"samples": total, "evaluation": count_outcomes(batches)}
    loader = Loader(
        sources=[unweighted_source(manifest)],
        tokenizer=tokenizer,
        data=data,
        batch=BatchSpec(
            image_size=32,
            context_length=16,
            micro_batch_size=1,
        ),
        seed=0,
        global_batch_size=1,
        state=LoaderState(),
    )
    steps = itertools.islice(loader.steps(), total)
    report["training"] = count_outcomes(batch for batches, _ in steps for batch in batches)
    loader.close()
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(report))


def count_outcomes(batches: Iterable[Batch]) -> dict[str, int]:
    """Number of usable samples, and of others by reason."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts["good"] += len(batch.keys)
        counts.update(problem.reason for problem in batch.problems)
    return dict(counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
