"""Tables as people bring them, written by other programs' writers."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV or Parquet, by the file's ending."""
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
        return
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
