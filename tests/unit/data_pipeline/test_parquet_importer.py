from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.load_samples import load_samples
from data_pipeline.preparing.importers.parquet import Parquet
from data_pipeline.preparing.importers.records import Record, SkippedRow
from tests.support.small_shards import make_png


def write_parquet(path: Path, count: int = 10, **columns: list[object]) -> None:
    """Write default columns, overridden by `columns`; an empty list removes a column."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    defaults: dict[str, list[object]] = {
        "key": [f"k{row}" for row in range(count)],
        "jpg": [make_png(row) for row in range(count)],
        "caption": [f"caption {row}" for row in range(count)],
        "similarity": [row / count for row in range(count)],
    }
    table = {name: values for name, values in (defaults | columns).items() if values}
    parquet.write_table(pyarrow.table(table), path, row_group_size=4)


def read_records(source: Parquet) -> list[Record]:
    return [row for row in source() if isinstance(row, Record)]


@pytest.mark.parametrize("rows", [[0], [3, 4], [5, 9], list(range(10))])
def test_rows_across_row_groups(tmp_path: Path, rows: list[int]) -> None:
    path = tmp_path / "p.parquet"
    write_parquet(path, exif=[b"x"] * 10, status=["success"] * 10)
    source = Parquet(files=(str(path),))
    records = read_records(source)
    assert [record.key for record in records] == [f"k{row}" for row in range(10)]

    samples = list(load_samples([records[row] for row in rows], source, decode=True))
    assert samples == [
        {
            "__key__": f"k{row}",
            "png": make_png(row),
            "txt": f"caption {row}",
            "json": {"similarity": row / 10, "status": "success"},
        }
        for row in rows
    ]


def test_structs_lists_and_invalid_rows(tmp_path: Path) -> None:
    path = tmp_path / "hf.parquet"
    image = {"bytes": make_png(1), "path": "x.png"}
    write_parquet(
        path,
        3,
        key=[],
        jpg=[],
        image=[image, {"bytes": b"no", "path": ""}, image],
        caption=[["a", " ", "b"], ["c"], [None]],
        similarity=[float("nan"), 1.0, 1.0],
    )
    source = Parquet(files=(str(path),))
    first, *others = load_samples(read_records(source), source, decode=False)
    assert first == {
        "__key__": "hf/000000",
        "png": make_png(1),
        "txt": "a",
        "json": {"similarity": None, "captions": ["a", "b"]},
    }
    reasons = [row.reason for row in others if isinstance(row, SkippedRow)]
    assert reasons == ["not-an-image", "no-caption"]


def test_file_without_images(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_parquet(path, 3, jpg=[])
    with pytest.raises(DataError, match=r"image bytes.*\.tar files.*`vlmoe data index`"):
        list(Parquet(files=(str(path),))())


def test_invalid_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "00000.parquet"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"00000.parquet cannot be read as parquet"):
        list(Parquet(files=(str(path),))())


def test_missing_pyarrow() -> None:
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from data_pipeline.preparing.importers.parquet import Parquet\n"
        "list(Parquet(files=('x.parquet',))())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "pip install 'vlmoe[parquet]'" in result.stderr
