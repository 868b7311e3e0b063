"""Result rows: what a CSV file under benchmarks/results holds."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.machine import ROOT, commit, machine, versions

__all__ = ["RESULTS", "append", "provenance", "read"]

RESULTS = ROOT / "benchmarks" / "results"
Value = str | int | float | bool | None


def provenance(module: str) -> dict[str, Value]:
    """When, where, with what and by which command: part of every row."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", module, *arguments]),
    }


def append(path: Path, row: Mapping[str, Value]) -> None:
    """Adds a row; a new file gets a header. ValueError when the file has other columns.

    Columns that a file lacks are added to it, with nothing in the earlier rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(row)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header == [column for column in columns if column in header] and header != columns:
            _widen(path, columns)
        elif header != columns:
            raise ValueError(f"{path} has other columns: {sorted(set(header) ^ set(columns)) or 'another order'}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _text(value) for name, value in row.items()})


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Writes the file anew with more columns; whoever reads it sees the old file or the new one."""
    earlier = read(path)
    with (new := path.with_suffix(".new")).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(earlier)
    new.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """All rows, values as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(value: Value) -> Value:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value
