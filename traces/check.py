"""What the rows of a trace must obey. Vectorised: millions of rows in about the time of reading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .trace import TraceMeta

_BLOCK_BYTES = 1 << 22  # of rows checked at once: the temporaries stay in the cache
_GROUPS = 1 << 15  # id groups compared at once
_KNOWN_FLAGS = 15

Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Fault:
    """The first thing wrong: column, row (0-based), and what."""

    column: str
    row: int
    problem: str

    def __str__(self) -> str:
        return f"column {self.column}, row {self.row}: {self.problem}"


def first_fault(arrays: Rows, meta: TraceMeta, *, previous_step: int = 0, workers: int = 1) -> Fault | None:
    """The fault in the lowest row, or None. `arrays` are whole columns [N, ...] by name, of the right layout.

    `previous_step` is the step before the first row, when the rows continue others.
    """
    rows = len(arrays["step"])
    row_bytes = max(1, sum(array.nbytes for array in arrays.values()) // max(rows, 1))
    block = max(1, _BLOCK_BYTES // row_bytes)

    def check(start: int) -> Fault | None:
        before = int(arrays["step"][start - 1]) if start else previous_step
        part = {name: array[start : start + block] for name, array in arrays.items()}
        return _block_fault(part, meta, before, start)

    with ThreadPoolExecutor(workers) as pool:
        return next((fault for fault in pool.map(check, range(0, rows, block)) if fault), None)


def _block_fault(rows: Rows, meta: TraceMeta, previous_step: int, start: int) -> Fault | None:
    found = _scalar_faults(rows, previous_step)
    for name in ("experts", "lookahead", "candidates"):
        if name in rows:
            found.append(_id_fault(name, rows[name], meta))
    found.append(_horizon_fault(rows, meta))
    beside = {"weights": "experts", "lookahead_weights": "lookahead", "candidate_logits": "candidates"}
    found += [_number_fault(name, rows[name], rows[ids]) for name, ids in beside.items() if name in rows]
    found += [_number_fault(name, rows[name]) for name in ("probs", "embedding", "sketch") if name in rows]
    found.append(_probability_fault(rows))
    faults = [fault for fault in found if fault]
    if not faults:
        return None
    first = min(faults, key=lambda fault: fault.row)
    return Fault(first.column, first.row + start, first.problem)


def _where(column: str, bad: NDArray[np.bool_], problem: Callable[[int], str]) -> Fault | None:
    """A fault at the first true entry of `bad` [rows]."""
    if not bad.any():
        return None
    row = int(bad.argmax())
    return Fault(column, row, problem(row))


def _scalar_faults(rows: Rows, previous_step: int) -> list[Fault | None]:
    step = rows["step"]
    before = np.concatenate((np.array([previous_step], step.dtype), step[:-1]))
    faults = [_where("step", step < before, lambda r: f"{step[r]} comes after {before[r]}, but steps never decrease")]
    limits = {"request": (0, None), "position": (0, None), "token": (-1, None), "attempt": (0, None)}
    for name, (low, high) in {**limits, "phase": (0, 1), "flags": (0, _KNOWN_FLAGS)}.items():
        faults.append(_limit_fault(name, rows[name], low, high))
    if "step_ns" in rows:
        times = rows["step_ns"]
        backwards = (times[:, 0] < 0) | (times[:, 1] < times[:, 0])
        faults.append(_where("step_ns", backwards, lambda r: f"start and end {times[r].tolist()} are out of order"))
    return faults


def _limit_fault(name: str, values: NDArray[Any], low: int, high: int | None) -> Fault | None:
    bad = values < low if high is None else (values < low) | (values > high)
    limit = f"at least {low}" if high is None else f"{low} to {high}"
    return _where(name, bad, lambda r: f"{values[r]} is out of range ({limit})")


def _id_fault(name: str, ids: NDArray[Any], meta: TraceMeta) -> Fault | None:
    """Out of range, twice in one choice, or present after an absent rank. ids [rows, ..., K]."""
    groups = ids.reshape(-1, ids.shape[-1])
    for start in range(0, len(groups), _GROUPS):
        bad = _bad_groups(np.ascontiguousarray(groups[start : start + _GROUPS].T), meta.model.experts)
        if bad.any():
            group = start + int(bad.argmax())
            place = np.unravel_index(group, ids.shape[:-1])
            problem = _group_problem(groups[group].tolist(), place[1:], ids.dtype, meta)
            return Fault(name, int(place[0]), problem)
    return None


def _bad_groups(ranks: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """ranks [K, groups], rank-major so that each comparison runs over a long contiguous axis. Returns [groups]."""
    largest = int(ranks.max(initial=0))
    twice = np.zeros(ranks.shape, np.bool_)
    for apart in range(1, len(ranks)):
        twice[:-apart] |= ranks[apart:] == ranks[:-apart]
    if largest < experts:
        return np.asarray(twice.any(axis=0))
    present = ranks != np.iinfo(ranks.dtype).max
    bad = (twice | (ranks >= experts)) & present
    bad[1:] |= present[1:] > present[:-1]
    return np.asarray(bad.any(axis=0))


def _group_problem(ids: list[int], place: tuple[Any, ...], dtype: np.dtype[Any], meta: TraceMeta) -> str:
    absent = int(np.iinfo(dtype).max)
    where = f"choice {ids} at {[int(index) for index in place]}"
    present = [expert for expert in ids if expert != absent]
    if any(expert >= meta.model.experts for expert in present):
        return f"{where} names expert {max(present)}, but the model has experts 0 to {meta.model.experts - 1}"
    if len(set(present)) < len(present):
        return f"{where} names an expert twice"
    return f"{where} has an expert after an absent one ({absent})"


def _horizon_fault(rows: Rows, meta: TraceMeta) -> Fault | None:
    """Lookahead past the last MoE layer must be absent."""
    if "lookahead" not in rows:
        return None
    ids, layers = rows["lookahead"], len(meta.model.moe_layers)
    absent = np.iinfo(ids.dtype).max
    for index, distance in enumerate(meta.lookahead_distances):
        past = (ids[:, max(0, layers + 1 - distance) :, index] != absent).reshape(len(ids), -1).any(axis=1)
        if past.any():
            row = int(past.argmax())
            return Fault("lookahead", row, f"distance {distance} names experts past the last layer")
    return None


def _number_fault(name: str, values: NDArray[np.float16], ids: NDArray[Any] | None = None) -> Fault | None:
    """NaN or infinite where an id is present. Compares the exponent's bits: float16 arithmetic is slow."""
    bad = (values.view(np.uint16) & 0x7C00) == 0x7C00
    if ids is not None and bad.any():
        bad &= ids != np.iinfo(ids.dtype).max
    bad = bad.reshape(len(values), -1)
    if not bad.any():
        return None
    row = int(bad.any(axis=1).argmax())
    place = [int(i) for i in np.unravel_index(int(bad[row].argmax()), values.shape[1:])]
    return Fault(name, row, f"the value at {place} is not a finite number")


def _probability_fault(rows: Rows) -> Fault | None:
    """Negative or above one: as unsigned bits, every float16 pattern above that of 1.0, minus zero aside."""
    if "probs" not in rows:
        return None
    bits = rows["probs"].view(np.uint16)
    bad = (bits > np.float16(1).view(np.uint16)) & (bits != 0x8000)
    outside = bad.reshape(len(bits), -1).any(axis=1)
    return _where("probs", outside, lambda _: "a probability lies outside 0 to 1")
