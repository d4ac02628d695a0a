"""One record per token and layer, as JSONL or CSV.

Keys: `layer` and `experts` (ids in rank order) must be there; `request` (default 0), `position` (default: how often the
request has passed this layer), `step`, `phase` (prefill, decode, 0, 1; default decode), `token`, `attempt`, `flags` and
`weights` may be. A CSV has them as columns; ids are either columns `expert_0`, `expert_1`, ... or one cell separated by
spaces, or one line per id (column `expert`, optionally `rank` and `weight`). Records come in any order of layers.
"""

from __future__ import annotations

import csv
import json
import operator
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..trace import DECODE, PREFILL
from .recording import Recording, attempts

_PHASES = {"prefill": PREFILL, "decode": DECODE, "0": PREFILL, "1": DECODE}
_COUNTERS = ("request", "layer", "position", "step", "token", "attempt", "flags")
_ALIASES = {"layer_id": "layer", "layer_idx": "layer", "il": "layer", "pos": "position", "token_idx": "position"}
_ALIASES |= {"token_pos": "position", "seq_id": "request", "request_id": "request", "token_id": "token"}
_ALIASES |= {"expert_ids": "experts", "topk": "experts", "expert_id": "expert"}

Record = dict[str, Any]


def read_jsonl(source: Path) -> Recording:
    """Raises InputError naming the line."""
    return _recording(source, _json_lines(source), "JSONL, one record per token and layer")


def read_csv(source: Path) -> Recording:
    """Raises InputError naming the line."""
    return _recording(source, _csv_lines(source), "CSV, expert ids per token and layer")


def _json_lines(source: Path) -> Iterator[tuple[int, Record]]:
    try:
        with source.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(source, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not readable as text ({error}); name a JSONL file") from None


def _object(source: Path, number: int, line: str) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{source}: line {number} is no JSON object; correct or remove it")
    return values


def _csv_lines(source: Path) -> Iterator[tuple[int, Record]]:
    try:
        with source.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            names = [_ALIASES.get(name.strip().lower(), name.strip().lower()) for name in next(reader, [])]
            ranks = _rank_columns(names)
            for line in reader:
                if line:
                    yield reader.line_num, _csv_record(dict(zip(names, line, strict=False)), ranks)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: not readable as CSV ({error}); name a CSV file with a header") from None


def _rank_columns(names: list[str]) -> list[str]:
    """expert_0, expert_1, ... or e0, e1, ..., in rank order."""
    numbered = [(int(match[1]), name) for name in names if (match := re.fullmatch(r"(?:expert_?|e)(\d+)", name))]
    return [name for _, name in sorted(numbered)]


def _csv_record(cells: dict[str, str], ranks: list[str]) -> Record:
    record: Record = {name: cell for name, cell in cells.items() if cell != ""}
    if ranks:
        record["experts"] = [cells[name] for name in ranks if cells.get(name)]
    for name, one in (("experts", "expert"), ("weights", "weight")):
        if isinstance(record.get(name), str):
            record[name] = re.findall(r"[^\s;|,\[\]]+", record[name])
        elif one in record:
            record[name] = [record.pop(one)]
    return record


def _integer(value: Any) -> int:
    """Raises TypeError or ValueError for what is no 32-bit integer."""
    number = int(value) if isinstance(value, str) else operator.index(value)
    if not -(2**31) <= number < 2**31:
        raise ValueError
    return number


class _Rows:
    """Token rows gathered from records, in order of first appearance."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], dict[str, int]] = {}  # key -> scalar columns
        self.choices: dict[tuple[int, ...], dict[int, list[int]]] = {}  # key -> layer -> ids
        self.weights: dict[tuple[int, ...], dict[int, list[float]]] = {}
        self._passed: Counter[tuple[int, int]] = Counter()  # (request, layer) -> records
        self._repeated: Counter[tuple[int, ...]] = Counter()

    def add(self, record: Record) -> None:
        """Raises KeyError for a missing key, ValueError or TypeError for a value of another kind."""
        values = {name: _integer(record[name]) for name in _COUNTERS if record.get(name) is not None}
        layer, request = values.pop("layer"), values.setdefault("request", 0)
        ids, weights = [_integer(id) for id in record["experts"]], [float(w) for w in record.get("weights") or ()]
        if "rank" in record and _integer(record["rank"]) > 0:
            self._add_rank(values, layer, ids, weights)
            return
        values.setdefault("position", self._passed[request, layer])
        self._passed[request, layer] += 1
        place = (request, values.get("step", -1), values["position"])
        again = self._repeated[(*place, layer)]
        self._repeated[(*place, layer)] += 1
        key = (*place, values.get("attempt", again))
        values["phase"] = _PHASES[str(record.get("phase", "decode")).lower()]
        self.rows.setdefault(key, values)
        self.choices.setdefault(key, {})[layer] = ids
        self.weights.setdefault(key, {})[layer] = weights

    def _add_rank(self, values: dict[str, int], layer: int, ids: list[int], weights: list[float]) -> None:
        """A later rank of a choice that is written one line per id: it belongs to the latest such choice."""
        request = values["request"]
        position = values.get("position", self._passed[request, layer] - 1)
        place = (request, values.get("step", -1), position)
        key = (*place, values.get("attempt", self._repeated[(*place, layer)] - 1))
        if layer not in self.choices.get(key, ()):
            raise KeyError("rank 0 of its choice")
        self.choices[key][layer] += ids
        self.weights[key][layer] += weights


def _recording(source: Path, lines: Iterator[tuple[int, Record]], by: str) -> Recording:
    rows = _Rows()
    for number, record in lines:
        if str(record.get("phase", "decode")).lower() not in _PHASES:
            raise InputError(f"{source}: line {number} has the phase {record['phase']!r}; write prefill or decode")
        try:
            rows.add(record)
        except KeyError as error:
            raise InputError(f"{source}: line {number} lacks {error}; add it") from None
        except (ValueError, TypeError):
            raise InputError(f"{source}: line {number} has a value of the wrong kind; write 32-bit integers") from None
    if not rows.rows:
        raise InputError(f"{source}: there are no records; name a file with one record per token and layer")
    return _assembled(source, rows, by)


def _assembled(source: Path, rows: _Rows, by: str) -> Recording:
    keys = list(rows.rows)
    stepped = ["step" in rows.rows[key] for key in keys]
    if any(stepped) and not all(stepped):
        raise InputError(f"{source}: some records name their step and others do not; name it in all or none")
    if all(stepped):
        keys.sort(key=lambda key: rows.rows[key]["step"])
    layers = tuple(sorted({layer for key in keys for layer in rows.choices[key]}))
    ranks = max(len(ids) for key in keys for ids in rows.choices[key].values())
    request, position = _scalar(rows, keys, "request"), _scalar(rows, keys, "position")
    assumed = [] if all(stepped) else ["requests ran one after the other: runs of prefill are one step"]
    return Recording(
        experts=_filled(rows.choices, keys, layers, ranks, np.int32, -1),
        request=request,
        position=position,
        phase=_scalar(rows, keys, "phase"),
        step=_scalar(rows, keys, "step") if all(stepped) else None,
        token=_scalar(rows, keys, "token", -1),
        attempt=_scalar(rows, keys, "attempt") if "attempt" in rows.rows[keys[0]] else attempts(request, position),
        flags=_scalar(rows, keys, "flags", 0),
        weights=_filled(rows.weights, keys, layers, ranks, np.float32, 0) if _weighted(rows) else None,
        layers=layers,
        recorded={"by": by, "assumed": assumed},
    )


def _weighted(rows: _Rows) -> bool:
    return any(weights for choice in rows.weights.values() for weights in choice.values())


def _scalar(rows: _Rows, keys: list[tuple[int, ...]], name: str, default: int = 0) -> NDArray[np.int32]:
    return np.array([rows.rows[key].get(name, default) for key in keys], np.int32)


def _filled(
    values: dict[tuple[int, ...], Any],
    keys: list[tuple[int, ...]],
    layers: tuple[int, ...],
    ranks: int,
    kind: Any,
    fill: int,
) -> NDArray[Any]:
    """[rows, layers, ranks]; `fill` where a layer or a rank has no value."""
    filled = np.full((len(keys), len(layers), ranks), fill, kind)
    place = {layer: index for index, layer in enumerate(layers)}
    for row, key in enumerate(keys):
        for layer, one in values[key].items():
            filled[row, place[layer], : len(one)] = one[:ranks]
    return filled
