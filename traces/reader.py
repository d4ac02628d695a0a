"""Reads a trace: decodes once into arrays, refuses with one sentence what breaks the format."""

from __future__ import annotations

import hashlib
import json
import mmap as memory_map
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InputError
from .check import first_fault
from .columns import COLUMNS, METADATA_KEY, NUMERIC, Layout, layout_problem
from .trace import FORMAT_VERSION, Trace, TraceMeta
from .writer import arrow_type, to_arrow

_MAGIC = b"PAR1"
_AGAIN = "copy, record or import it again"
_WORKERS = min(8, os.cpu_count() or 1)

Arrays = dict[str, NDArray[Any]]


def load_trace(path: str | Path, *, mmap: bool = False) -> Trace:
    """The trace in a file, decoded and checked.

    With `mmap` the arrays are memory maps (copy on write) of an Arrow IPC copy in the user cache, made and
    checked at the first use and found again by the hash of the file's bytes. Raises InputError naming file,
    column and row.
    """
    path = Path(path)
    if not mmap:
        return _decoded(path)
    copy = cache_folder() / "traces" / f"{_file_sha256(path)}.v{FORMAT_VERSION}.arrow"
    try:
        return _mapped(copy)
    except (OSError, ValueError, KeyError, TypeError):  # no copy yet, or a damaged one: make it (again)
        _write_copy(copy, _decoded(path))
    return _mapped(copy)


def read_header(path: str | Path) -> tuple[TraceMeta, dict[str, Layout], int]:
    """Metadata, columns and number of rows, without decoding any row. Raises InputError."""
    path = Path(path)
    with _readable(path), pq.ParquetFile(path) as file:
        meta, layouts = _header(path, file)
        return meta, layouts, file.metadata.num_rows


def read_columns(path: str | Path, names: Sequence[str]) -> tuple[TraceMeta, Arrays]:
    """Metadata and the named columns only, not checked row by row. Raises InputError."""
    path = Path(path)
    with _readable(path):
        with pq.ParquetFile(path) as file:
            meta, layouts = _header(path, file)
            footer = file.metadata
        return meta, _decode(path, footer, {name: layouts[name] for name in names})


def cache_folder() -> Path:
    """Where this user's caches of moeflow live; may not exist yet."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "moeflow"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "moeflow" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "moeflow"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the system and pyarrow raise for a missing, foreign or damaged file into one sentence."""
    try:
        _refuse_foreign(path)
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a trace (Parquet) that exists") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a trace file") from None
    except (pa.ArrowException, OSError, MemoryError, OverflowError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(f"{path}: the file is truncated or damaged ({reason}); {_AGAIN}") from None


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_MAGIC)))
        tail = file.read()
    if head != _MAGIC:
        what = "is not Parquet" if size else "is empty"
        raise InputError(f"{path}: the file {what}, so it is no trace; `trace import` converts other formats")
    if tail != _MAGIC or size < 12:
        raise InputError(f"{path}: the file is truncated (its end is missing); {_AGAIN}")


def _header(path: Path, file: pq.ParquetFile) -> tuple[TraceMeta, dict[str, Layout]]:
    document = (file.metadata.metadata or {}).get(METADATA_KEY)
    if document is None:
        raise InputError(
            f"{path}: Parquet without the metadata key `{METADATA_KEY.decode()}`, so it is no trace; "
            "make one with `trace record` or `trace import`"
        )
    meta, layouts = _parse_document(path, document)
    layouts |= _undeclared(file.schema_arrow, layouts)
    problem = layout_problem(layouts, meta) or _schema_problem(file.schema_arrow, layouts)
    if problem:
        raise InputError(f"{path}: column {problem[0]} {problem[1]}; {_AGAIN}")
    return meta, layouts


def _parse_document(path: Path, document: bytes) -> tuple[TraceMeta, dict[str, Layout]]:
    try:
        values = json.loads(document, parse_constant=_refuse_constant)
        version = values.pop("format")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise InputError(
                f"{path}: the trace has format version {version}, but this moeflow reads version "
                f"{FORMAT_VERSION}; install a newer moeflow"
            )
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}")
        columns = values.pop("columns")
        layouts = {name: Layout(at["dtype"], tuple(map(int, at["shape"]))) for name, at in columns.items()}
        if not {at.dtype for at in layouts.values()} <= NUMERIC:
            raise ValueError("a column's dtype is unknown")
        return TraceMeta.from_dict(values), layouts
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{path}: the trace's metadata cannot be understood ({what}); {_AGAIN}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _undeclared(schema: pa.Schema, layouts: dict[str, Layout]) -> dict[str, Layout]:
    """Plain numeric columns that another tool has added without declaring them."""
    plain = [field for field in schema if field.name not in layouts and field.name not in COLUMNS]
    return {
        field.name: Layout(np.dtype(field.type.to_pandas_dtype()).name, ())
        for field in plain
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    }


def _schema_problem(schema: pa.Schema, layouts: dict[str, Layout]) -> tuple[str, str] | None:
    """The Parquet columns must be the declared ones."""
    if len(set(schema.names)) < len(schema.names):
        return next(name for name in schema.names if schema.names.count(name) > 1), "occurs twice"
    for field in schema:
        if field.name not in layouts:
            return field.name, f"is stored as {field.type}, but the metadata does not declare it"
        if field.type != arrow_type(layouts[field.name]):
            return field.name, f"is stored as {field.type}, but declared as {arrow_type(layouts[field.name])}"
    missing = [name for name in layouts if name not in schema.names]
    return (missing[0], "is declared but not stored") if missing else None


def _decoded(path: Path) -> Trace:
    with _readable(path):
        with pq.ParquetFile(path) as file:
            meta, layouts = _header(path, file)
            footer = file.metadata
        if not footer.num_rows:
            raise InputError(f"{path}: the trace has no rows; record at least one token")
        arrays = _decode(path, footer, layouts)
    fault = first_fault(arrays, meta, workers=_WORKERS)
    if fault:
        raise InputError(f"{path}: {fault}; {_AGAIN}")
    return _assembled(meta, arrays)


def _assembled(meta: TraceMeta, arrays: Arrays) -> Trace:
    extra = {name: array for name, array in arrays.items() if name not in COLUMNS}
    return Trace(meta=meta, extra=extra, **{name: array for name, array in arrays.items() if name in COLUMNS})


def _decode(path: Path, footer: pq.FileMetaData, layouts: dict[str, Layout]) -> Arrays:
    """Row groups are decoded side by side, each straight into its place in the whole arrays."""
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if sum(counts) != footer.num_rows or min(counts, default=0) < 0:
        raise ValueError("the row counts contradict each other")
    arrays = {name: np.empty((footer.num_rows, *at.shape), at.dtype) for name, at in layouts.items()}
    starts = np.cumsum([0, *counts[:-1]]).tolist()

    def decode(group: int) -> None:
        with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            table = file.read_row_group(group, columns=list(layouts), use_threads=False)
        if table.num_rows != counts[group]:
            raise ValueError(f"row group {group} is shorter than the file says")
        for name, array in arrays.items():
            rows = array[starts[group] : starts[group] + counts[group]]
            _copy_into(rows, table.column(name), layouts[name])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(decode, range(len(counts))):
            pass
    return arrays


def _copy_into(target: NDArray[Any], column: pa.ChunkedArray, layout: Layout) -> None:
    if column.null_count:
        raise ValueError("a column has nulls")
    row = 0
    for chunk in column.chunks:
        target[row : row + len(chunk)] = _view(chunk, layout)
        row += len(chunk)


def _view(chunk: pa.Array, layout: Layout) -> NDArray[Any]:
    """The chunk's own memory as an array [n, ...]."""
    data = np.frombuffer(chunk.buffers()[1], np.uint8)
    start = chunk.offset * layout.row_bytes
    data = data[start : start + len(chunk) * layout.row_bytes]
    return data.view(np.dtype(layout.dtype).newbyteorder("<")).reshape(len(chunk), *layout.shape)


def _file_sha256(path: Path) -> str:
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_copy(copy: Path, trace: Trace) -> None:
    """One Arrow record batch, renamed into place when complete: several processes may do this at once."""
    layouts = {name: Layout(array.dtype.name, array.shape[1:]) for name, array in trace.columns.items()}
    document = {
        "content_sha256": trace.content_sha256,
        "meta": trace.meta.to_dict(),
        "columns": {name: [at.dtype, list(at.shape)] for name, at in layouts.items()},
    }
    fields = [(name, arrow_type(layout)) for name, layout in layouts.items()]
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(document)})
    arrays = [to_arrow(array) for array in trace.columns.values()]
    partial = copy.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
            file.write_batch(pa.record_batch(arrays, schema=schema))
        partial.replace(copy)
    except OSError as error:
        raise InputError(
            f"{copy.parent}: the memory-mapped copy cannot be written ({error.strerror or error}); "
            "free some space or set XDG_CACHE_HOME to another folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _mapped(copy: Path) -> Trace:
    with copy.open("rb") as file:
        memory = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY)
    whole = pa.py_buffer(memory)
    batch = pa.ipc.open_file(whole).get_batch(0)
    document = json.loads(batch.schema.metadata[METADATA_KEY])
    arrays = {}
    for name, (dtype, shape) in document["columns"].items():
        offset = batch.column(name).buffers()[1].address - whole.address
        count = batch.num_rows * int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(memory, dtype, count, offset).reshape(batch.num_rows, *shape)
    trace = _assembled(TraceMeta.from_dict(document["meta"]), arrays)
    trace.__dict__["content_sha256"] = document["content_sha256"]  # fills the cached property: no rehashing
    return trace
