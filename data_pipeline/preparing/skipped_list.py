"""The list of rows that did not become a sample: `skipped.jsonl` of a dataset, or of an error."""

from __future__ import annotations

import json
from collections import Counter

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.preparing.importers.records import SkippedRow
from data_pipeline.preparing.resumable_shards import PARTS_FOLDER
from data_pipeline.shards.manifest import MANIFEST_NAME, SKIPPED_NAME


def write_skipped(skipped: list[SkippedRow], folder: str, name: str = SKIPPED_NAME) -> str:
    """Write the list; returns its address.

    Args:
        skipped: The rows.
        folder: Folder of the dataset.
        name: Path of the list in the folder.

    Raises:
        StorageError: It cannot be written.
    """
    url = storage.join(folder, name)
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in skipped]
    storage.write_bytes(url, "".join(lines).encode("utf-8", "backslashreplace"))
    return url


def too_many_skipped(
    problem: str, skipped: list[SkippedRow], folder: str, part: Part = SINGLE_PART
) -> DataError:
    """The error, after the list of the rows that were skipped so far is written.

    Args:
        problem: The message, without the rows.
        skipped: The rows.
        folder: Folder of the dataset.
        part: Part of the shards that is written.
    """
    message = problem + _examples(skipped)
    if not skipped:
        return DataError(message)
    try:
        url = write_skipped(skipped, folder, _name_after_error(folder, part))
    except StorageError as error:
        return DataError(f"{message}. Their list cannot be written: {error}")
    return DataError(f"{message}. All that were found until now: {storage.redact(url)}")


def _name_after_error(folder: str, part: Part) -> str:
    if part != SINGLE_PART:  # other parts may be written at the same time
        return f"{PARTS_FOLDER}/skipped-{part[0]}-of-{part[1]}.jsonl"
    if storage.exists(storage.join(folder, MANIFEST_NAME)):  # the list there is of that dataset
        return f"{PARTS_FOLDER}/{SKIPPED_NAME}"
    return SKIPPED_NAME


def _examples(skipped: list[SkippedRow]) -> str:
    if not skipped:
        return ""
    reasons = Counter(row.reason for row in skipped).most_common()
    counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    first = "; ".join(f"{row.origin}: {row.reason}: {row.detail}" for row in skipped[:3])
    return f" ({counts}). First: {first}"
