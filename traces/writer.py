"""Writes a trace as a stream: memory stays bounded however long the recording is."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InputError
from .check import first_fault
from .columns import COLUMNS, DEFAULTS, METADATA_KEY, NUMERIC, REQUIRED, Layout, dtype_of, layout_problem
from .trace import FORMAT_VERSION, Request, Trace, TraceMeta

GROUP_BYTES = 1 << 24  # decoded bytes per row group: what the writer holds and one thread reads at a time
_PAGE_BYTES = 1 << 20
_ZSTD_LEVEL = 1  # routing hardly compresses: higher levels cost time and save under 1 %

Arrays = dict[str, NDArray[Any]]


class TraceWriter:
    """Writes the rows appended to it; the file appears under its name only when all of it is there.

        with TraceWriter(path, meta) as writer:
            writer.append(step=..., request=..., position=..., phase=..., experts=...)
            writer.finish(requests=[...])  # optional: what is known only at the end

    The first `append` fixes which columns exist. Raises InputError for rows that break the format; then, as
    after any exception inside the `with` block, nothing is left on disk.
    """

    def __init__(self, path: str | Path, meta: TraceMeta) -> None:
        self.path, self.meta, self.rows = Path(path), meta, 0
        self.requests: Sequence[Request] = meta.requests
        self.recorded: dict[str, Any] = meta.recorded
        self.layouts: dict[str, Layout] = {}
        self._pending: list[Arrays] = []
        self._pending_rows = 0
        self._last_step = 0
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._file: pq.ParquetWriter | None = None
        self._finished = False
        if not self.path.absolute().parent.is_dir():  # now, not after hours of recording
            raise InputError(f"{self.path}: the folder does not exist; create it or choose another place")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a folder; name a file")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and not self._finished:
                self.finish()
        finally:
            if not self._finished:
                self._discard()

    def append(self, **arrays: Any) -> None:
        """Add rows: arrays [n, ...] under the names of `Trace`'s fields, in execution order.

        `token`, `attempt` and `flags` may be missing. Elements of another type are converted where their values
        fit (int64 ids, float32 weights). Unknown names become extra columns.
        """
        rows = self._converted(arrays)
        if not self.layouts:
            self._begin({name: Layout(array.dtype.name, array.shape[1:]) for name, array in rows.items()})
        self._same_layout(rows)
        self._pending.append(rows)
        self._pending_rows += len(rows["step"])
        while self._pending_rows >= self._group_rows:
            self._write_group(self._group_rows)

    def finish(self, *, requests: Sequence[Request] | None = None, recorded: dict[str, Any] | None = None) -> None:
        """Write what is left, the metadata, and put the file under its name. No rows at all are refused."""
        self.requests = self.requests if requests is None else requests
        self.recorded = self.recorded if recorded is None else recorded
        if self._pending_rows:
            self._write_group(self._pending_rows)
        if self._file is None:
            raise InputError(f"{self.path}: there are no rows, so no trace is written; give at least one token")
        self._file.add_key_value_metadata({METADATA_KEY: self._document()})
        self._file.close()
        self._partial.replace(self.path)
        self._finished = True

    @property
    def _group_rows(self) -> int:
        return max(1, GROUP_BYTES // sum(layout.row_bytes for layout in self.layouts.values()))

    def _converted(self, arrays: dict[str, Any]) -> Arrays:
        rows = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
        missing = [name for name in REQUIRED if name not in rows and name not in DEFAULTS]
        if missing:
            raise InputError(f"{self.path}: column {missing[0]} is missing; append it with every block")
        count = len(rows["step"])
        for name, value in DEFAULTS.items():
            rows.setdefault(name, np.full(count, value, COLUMNS[name].dtype))
        for name, array in rows.items():
            if array.ndim == 0 or len(array) != count:
                raise InputError(
                    f"{self.path}: column {name} has shape {array.shape}, but step has {count} rows; "
                    "append the same number of rows in every column"
                )
            rows[name] = self._as_dtype(name, array)
        return {name: rows[name] for name in (*COLUMNS, *(rows.keys() - COLUMNS.keys())) if name in rows}

    def _as_dtype(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        wanted = np.dtype(dtype_of(name, self.meta) or array.dtype)
        if array.dtype != wanted and array.size:
            integers = array.dtype.kind in "iu" and wanted.kind in "iu"
            fits = integers and np.iinfo(wanted).min <= array.min() and array.max() <= np.iinfo(wanted).max
            if not fits and not (array.dtype.kind == wanted.kind == "f"):
                raise InputError(
                    f"{self.path}: column {name} has {array.dtype} values that {wanted} does not hold; "
                    f"convert them (an absent expert is the largest {wanted})"
                )
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which the check refuses by row
            return array.astype(wanted.newbyteorder("<"), copy=True)  # the caller may reuse its buffer

    def _begin(self, layouts: dict[str, Layout]) -> None:
        for name, layout in layouts.items():
            if layout.dtype not in NUMERIC:
                raise InputError(f"{self.path}: column {name} holds {layout.dtype}; append numbers")
        problem = layout_problem(layouts, self.meta)
        if problem:
            raise InputError(f"{self.path}: column {problem[0]} {problem[1]}; append what fits the model")
        self.layouts = layouts

    def _same_layout(self, rows: Arrays) -> None:
        if rows.keys() != self.layouts.keys():
            odd = sorted(rows.keys() ^ self.layouts.keys())
            raise InputError(f"{self.path}: column {odd[0]} is in some blocks only; append it in all or none")
        for name, array in rows.items():
            if Layout(array.dtype.name, array.shape[1:]) != self.layouts[name]:
                raise InputError(
                    f"{self.path}: column {name} has shape {list(array.shape[1:])} per row after "
                    f"{list(self.layouts[name].shape)} before; append one shape throughout"
                )

    def _write_group(self, count: int) -> None:
        group = self._take(count)
        fault = first_fault(group, self.meta, previous_step=self._last_step)
        if fault:
            raise InputError(
                f"{self.path}: column {fault.column}, row {self.rows + fault.row}: {fault.problem}; "
                "nothing was written: correct what is appended"
            )
        if self._file is None:
            self._file = self._open()
        columns = [to_arrow(array) for array in group.values()]
        self._file.write_table(pa.Table.from_arrays(columns, schema=self._schema()), row_group_size=count)
        self._last_step = int(group["step"][-1])
        self.rows += count

    def _take(self, count: int) -> Arrays:
        """The oldest `count` pending rows, removed from the pending ones."""
        joined = {name: np.concatenate([block[name] for block in self._pending]) for name in self.layouts}
        rest = {name: array[count:] for name, array in joined.items()}
        self._pending_rows -= count
        self._pending = [rest] if self._pending_rows else []
        return {name: array[:count] for name, array in joined.items()}

    def _schema(self) -> pa.Schema:
        return pa.schema(pa.field(name, arrow_type(layout), nullable=False) for name, layout in self.layouts.items())

    def _open(self) -> pq.ParquetWriter:
        try:
            return pq.ParquetWriter(
                self._partial,
                self._schema(),
                compression="zstd",
                compression_level=_ZSTD_LEVEL,
                use_dictionary=False,
                write_statistics=False,
                data_page_size=_PAGE_BYTES,
                write_page_checksum=True,
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise InputError(f"{self.path}: cannot be written ({reason}); choose another place") from None

    def _document(self) -> str:
        meta = replace(self.meta, requests=tuple(self.requests), recorded=self.recorded)
        columns = {name: {"dtype": at.dtype, "shape": list(at.shape)} for name, at in self.layouts.items()}
        try:
            return json.dumps({"format": FORMAT_VERSION, **meta.to_dict(), "columns": columns}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.path}: the metadata is no JSON ({error}); give plain, finite values") from None

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
        self._partial.unlink(missing_ok=True)


def arrow_type(layout: Layout) -> pa.DataType:
    """Scalars are plain columns; arrays are fixed-size binary."""
    return pa.binary(layout.row_bytes) if layout.shape else pa.from_numpy_dtype(np.dtype(layout.dtype))


def to_arrow(array: NDArray[Any]) -> pa.Array:
    """A whole column [n, ...] as Arrow, without copying what is contiguous already."""
    kind = arrow_type(Layout(array.dtype.name, array.shape[1:]))
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(np.ascontiguousarray(array))])


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write a whole trace. Raises InputError, and leaves nothing behind, where it breaks the format."""
    block = 1 << 16
    with TraceWriter(path, trace.meta) as writer:
        for start in range(0, trace.rows, block):
            writer.append(**{name: array[start : start + block] for name, array in trace.columns.items()})
