"""Rows of parquet files: each becomes a sample with its content, or is skipped with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from data_pipeline.preparing.importers import parquet as importer
from data_pipeline.preparing.importers.load_samples import load_samples
from data_pipeline.preparing.importers.parquet import Parquet
from data_pipeline.preparing.importers.records import Record, SkippedRow
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PNGS = [make_png(index) for index in range(3)]
_IMAGES = st.sampled_from([*PNGS, *PNGS, b"", b"text", None])
_TEXTS = (
    st.none()
    | st.sampled_from(["", " ", "a cat", "ein Fu\u0308chs ", "日本"])
    | st.text(max_size=5)
)
_NUMBERS = st.none() | st.integers(-5, 5) | st.just(float("nan")) | st.floats(-1, 1)
_ROWS = st.tuples(st.none() | st.sampled_from(["k", "x/y", "0"]), _IMAGES, _TEXTS, _NUMBERS)


def expected_captions(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


def check_sample(sample: Any, row: tuple[Any, ...]) -> None:
    key, image, text, number = row
    captions = expected_captions(text)
    if isinstance(sample, SkippedRow):
        assert sample.reason == ("no-caption" if image in PNGS else "not-an-image")
        assert sample.reason == "not-an-image" or not captions
        return
    assert image in PNGS and captions
    fields = dict(sample["json"])
    has_number = number is not None and number == number
    assert fields.pop("number") == (float(number) if has_number else None)
    assert fields == ({"captions": captions} if len(captions) > 1 else {})
    assert (sample["png"], sample["txt"]) == (image, captions[0])
    assert key is None or sample["__key__"] == key


@num_examples
def test_every_row_is_a_sample_or_skipped(
    examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "_BATCH_ROWS", 2)
    monkeypatch.setattr(importer, "_KEY_BATCH_ROWS", 3)
    path = tmp_path / "rows.parquet"
    source = Parquet(files=(str(path),))

    def check(
        rows: list[tuple[Any, ...]], lists: bool, in_struct: bool, group: int, first: int
    ) -> None:
        rows = [(key, image, [text, text] if lists and text is not None else text, number)
                for key, image, text, number in rows]  # fmt: skip
        images = [row[1] if not in_struct else {"bytes": row[1], "path": None} for row in rows]
        text_type = pyarrow.list_(pyarrow.string()) if lists else pyarrow.string()
        image_type = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table(
            {
                "key": pyarrow.array([row[0] for row in rows], pyarrow.string()),
                "image": pyarrow.array(images, image_type if in_struct else pyarrow.binary()),
                "caption": pyarrow.array([row[2] for row in rows], text_type),
                "number": pyarrow.array(
                    [None if row[3] is None else float(row[3]) for row in rows], pyarrow.float64()
                ),
            }
        )
        parquet.write_table(table, path, row_group_size=group)
        records = [row for row in source() if isinstance(row, Record)]
        assert len(records) == len(rows) and all(record.inputs == 1 for record in records)
        samples = list(load_samples(records[first:], source, decode=True))
        for sample, row in zip(samples, rows[first:], strict=True):
            check_sample(sample, row)

    rows = st.lists(_ROWS, min_size=1, max_size=8)
    flags = st.booleans()
    check_property(check, examples, rows, flags, flags, st.integers(1, 5), st.integers(0, 3))
