"""The columns of a trace file: name, element type, shape. Reader, writer and check all ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .trace import TraceMeta, expert_dtype

METADATA_KEY = b"moeflow"
_ANY_SIZE = 2**31 - 1
_MOST_EXPERTS = 2**16 - 1  # the largest uint16 marks absent entries


@dataclass(frozen=True)
class Column:
    """One row of the table below. `dtype` is a NumPy name, or `id`: uint8 while E <= 255, else uint16."""

    dtype: str
    dims: tuple[str, ...] = ()  # a row's shape; () = scalar, stored as a plain Parquet column
    beside: str = ""  # the column whose shape it shares and without which it means nothing


COLUMNS = {
    "step": Column("int32"),
    "request": Column("int32"),
    "position": Column("int32"),
    "token": Column("int32"),
    "phase": Column("int8"),
    "attempt": Column("int16"),
    "flags": Column("uint8"),
    "experts": Column("id", ("L", "K")),
    "weights": Column("float16", ("L", "K")),
    "step_ns": Column("int64", ("2",)),
    "lookahead": Column("id", ("L+1", "D", "K'")),
    "lookahead_weights": Column("float16", ("L+1", "D", "K'"), beside="lookahead"),
    "candidates": Column("id", ("L", "M")),
    "candidate_logits": Column("float16", ("L", "M"), beside="candidates"),
    "probs": Column("float16", ("L", "E")),
    "embedding": Column("float16", ("s",)),
    "sketch": Column("float16", ("n", "s")),
}
REQUIRED = ("step", "request", "position", "token", "phase", "attempt", "flags", "experts")
DEFAULTS = {"token": -1, "attempt": 0, "flags": 0}  # what a writer that leaves them out means
NUMERIC = frozenset(np.dtype(code).name for code in "bhiqBHIQefd")


@dataclass(frozen=True)
class Layout:
    """Element type and row shape of one stored column."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


def dtype_of(name: str, meta: TraceMeta) -> str | None:
    """The element type that the format gives a column; None for one that it does not know."""
    if name not in COLUMNS:
        return None
    dtype = COLUMNS[name].dtype
    return np.dtype(expert_dtype(meta.model.experts)).name if dtype == "id" else dtype


def layout_problem(layouts: Mapping[str, Layout], meta: TraceMeta) -> tuple[str, str] | None:
    """(column, what is wrong) for the first column that does not fit the model, or None."""
    if meta.model.experts > _MOST_EXPERTS:
        return "experts", f"cannot hold ids of {meta.model.experts} experts (at most {_MOST_EXPERTS})"
    for name in REQUIRED:
        if name not in layouts:
            return name, "is missing"
    for name, layout in layouts.items():
        problem = _column_problem(name, layout, layouts, meta)
        if problem:
            return name, problem
    return None


def _column_problem(name: str, layout: Layout, layouts: Mapping[str, Layout], meta: TraceMeta) -> str | None:
    dtype = dtype_of(name, meta)
    if dtype is None:
        known = layout.dtype in NUMERIC and all(size > 0 for size in layout.shape)
        return None if known else f"has elements of type {layout.dtype} and shape {list(layout.shape)}"
    if layout.dtype != dtype:
        return f"holds {layout.dtype}, but must hold {dtype} for {meta.model.experts} experts"
    column = COLUMNS[name]
    if not _fits(column.dims, layout.shape, meta):
        return f"has shape {list(layout.shape)} per row, but must be {_expected(column.dims, meta)}"
    if column.beside and column.beside not in layouts:
        return f"needs the column {column.beside}, which is missing"
    if column.beside and layouts[column.beside].shape != layout.shape:
        return f"has shape {list(layout.shape)} per row, unlike {column.beside}"
    return None


def _bounds(dim: str, meta: TraceMeta) -> tuple[int, int]:
    """Smallest and largest size that a dimension may have."""
    model = meta.model
    layers, experts, top_k = len(model.moe_layers), model.experts, model.top_k
    distances = len(meta.lookahead_distances)
    fixed = {"L": layers, "L+1": layers + 1, "K": top_k, "E": experts, "D": distances, "2": 2}
    if dim in fixed:
        return fixed[dim], fixed[dim]
    return {"K'": (top_k, experts), "M": (min(2 * top_k, experts), experts)}.get(dim, (1, _ANY_SIZE))


def _fits(dims: tuple[str, ...], shape: tuple[int, ...], meta: TraceMeta) -> bool:
    if len(dims) != len(shape) or 0 in shape:
        return False
    bounds = [_bounds(dim, meta) for dim in dims]
    return all(low <= size <= high for size, (low, high) in zip(shape, bounds, strict=True))


def _expected(dims: tuple[str, ...], meta: TraceMeta) -> str:
    """For example "[L=16, M=16..64]"."""
    sizes = []
    for dim in dims:
        low, high = _bounds(dim, meta)
        limit = f">={low}" if high == _ANY_SIZE else f"={low}" if low == high else f"={low}..{high}"
        sizes.append(dim + limit)
    return "[" + ", ".join(sizes) + "]"
