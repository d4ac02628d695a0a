"""`run_sweep`: the cells of a grid, each computed once whatever interrupts it, as rows of one Parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..traces.whole_file import write_whole
from .cell import COLUMNS, Figures, TraceFile, run_cell
from .executors import Execute
from .grid import Cell
from .journal import Journal

SWEEP_FORMAT = 1

Row = dict[str, Any]


def journal_path(out: Path) -> Path:
    """Where a sweep that writes `out` keeps what it has finished."""
    return out.with_name(f"{out.name}.journal")


def run_sweep(
    cells: Sequence[Cell],
    trace: TraceFile,
    options: dict[str, Any],
    out: Path,
    execute: Execute,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Row], list[str]]:
    """Compute what the journal beside `out` lacks, then write all rows to `out`, in the order of `cells`.

    Returns the rows and the names of cells that failed: their workers died, or their policy raised. These have
    `error` in their rows, as have cells that cannot be; but the journal stays, so that another run tries them again.
    `options` go to `simulate`; `progress` is called with (cells done, cells). Raises InputError, and leaves the
    journal, where no cell can be computed or nothing can be written.
    """
    journal = Journal(journal_path(out))
    wanted = {cell.digest: cell for cell in cells if cell.policy is not None}
    figures: dict[str, Figures] = {digest: journal.entries[digest] for digest in wanted if digest in journal.entries}
    left = [cell for digest, cell in wanted.items() if digest not in figures]
    failed = []
    for cell, found in execute(left, partial(run_cell, trace=trace, options=options)) if left else ():
        figures[cell.digest] = found
        if found.get("failed"):
            failed.append(str(cell))
        elif not found.get("error"):  # what cannot be is found out again at once
            journal.append(cell.digest, found)
        progress(len(figures), len(wanted))
    rows = [_row(cell, figures.get(cell.digest, {"error": cell.problem})) for cell in cells]
    _write(out, rows, cells, trace, journal)
    if not failed:
        journal.remove()
    return rows, sorted(failed)


def _row(cell: Cell, figures: Figures) -> Row:
    labels = {
        "policy": cell.name,
        **cell.settings,
        "budget": cell.budget,
        "hardware": cell.hardware.name,
        "link": cell.hardware.link.name,
    }
    document = None if cell.policy is None else json.dumps(cell.policy.document)
    return labels | {column: figures.get(column) for column in COLUMNS} | {"document": document}


def _write(out: Path, rows: list[Row], cells: Sequence[Cell], trace: TraceFile, journal: Journal) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(("policy", "budget", "hardware", "link", "document"), pa.string())
    types |= {column: pa.type_for_alias(alias) for column, (alias, _) in COLUMNS.items()}
    types |= {key: _type_of([row[key] for row in rows]) for key in cells[0].settings}
    for key in cells[0].settings:
        if types[key] == pa.string():
            rows = [{**row, key: None if row[key] is None else str(row[key])} for row in rows]
    about = {"format": SWEEP_FORMAT, "moeflow": trace.moeflow, "trace_sha256": trace.content_sha256}
    schema = pa.schema([(name, types[name]) for name in rows[0]], metadata={"moeflow": json.dumps(about)})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    remedy = "choose another place"
    if journal.entries:
        remedy = f"what was computed is kept in {journal.path}: make room there and run the same command again"
    write_whole(out, buffer.getvalue(), remedy)


def _type_of(values: list[Any]) -> Any:
    """Of an axis: numbers stay numbers, everything else is text."""
    import pyarrow as pa

    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


def writable(out: Path) -> None:
    """Raises InputError where a sweep could not write `out`, before hours of work."""
    if out.is_dir():
        raise InputError(f"--out {out}: it is a folder; name a file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist; create it or choose another place")
