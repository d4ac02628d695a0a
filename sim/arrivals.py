"""When requests arrive: as recorded, at random, or as a file says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ..errors import InputError
from ..traces.trace import Request, Trace

POISSON = re.compile(r"poisson:(.*)")
LATEST_S = 1e6  # eleven days, chosen here: the clock counts picoseconds in 64 bits, which last for a hundred


def with_arrivals(trace: Trace, arrivals: str | Path | None, seed: int | None = None) -> Trace:
    """The same rows, every request with an arrival time.

    arrivals: `trace` (the recorded ones, which must be complete), `poisson:RATE` (requests per second, in the order
    of their first rows, drawn from `seed`, default 0) or a file of one JSON object per line with `request` and
    `arrival_s`; None takes the recorded ones and 0 where there is none. Raises InputError for anything else.
    """
    text = str(arrivals)
    drawn = POISSON.fullmatch(text)
    if seed is not None and not drawn:
        raise InputError(f"--seed {seed}: only --arrivals poisson:RATE draws anything; leave it out")
    ids, first = np.unique(trace.request, return_index=True)
    requests = ids[np.argsort(first, kind="stable")].tolist()
    if drawn:
        times = _poisson(drawn[1], 0 if seed is None else seed, requests)
    elif arrivals is None:
        times = dict.fromkeys(requests, 0.0) | _recorded(trace)
    elif text == "trace":
        times = _recorded(trace)
        _refuse_lacking(requests, times, "--arrivals trace", "use poisson:RATE or a file")
    else:
        times = _from_file(Path(text), set(requests))
        _refuse_lacking(sorted(requests), times, f"--arrivals {text}", "give each a line")
    late = [request for request in requests if not 0 <= times[request] < LATEST_S]
    if late:
        raise InputError(
            f"request {late[0]} arrives at {times[late[0]]:g} s: expected seconds from 0 to {LATEST_S:g} after the "
            "first; use another --arrivals"
        )
    known = {record.id: record for record in trace.meta.requests}
    records = {**known, **{request: known.get(request, Request(request)) for request in requests}}
    complete = tuple(replace(record, arrival_s=times.get(id, record.arrival_s)) for id, record in records.items())
    return replace(trace, meta=replace(trace.meta, requests=complete))


def describe(arrivals: str | Path | None, seed: int | None) -> dict[str, str | int | None]:
    """What a result says about them."""
    if arrivals is None:
        return {"arrivals": None, "seed": None}
    drawn = POISSON.fullmatch(str(arrivals))
    return {"arrivals": Path(arrivals).name, "seed": (seed or 0) if drawn else None}


def _recorded(trace: Trace) -> dict[int, float]:
    return {record.id: record.arrival_s for record in trace.meta.requests if record.arrival_s is not None}


def _refuse_lacking(requests: list[int], times: dict[int, float], where: str, remedy: str) -> None:
    lacking = [request for request in requests if request not in times]
    if lacking:
        raise InputError(
            f"{where}: no arrival time for {len(lacking)} of {len(requests)} requests (request {lacking[0]} first); "
            f"{remedy}"
        )


def _poisson(rate: str, seed: int, requests: list[int]) -> dict[int, float]:
    """Independent exponential gaps, the first from time 0 on; Python's generator gives the same on any version."""
    try:
        per_second = float(rate)
    except ValueError:
        per_second = math.nan
    if not (per_second > 0 and math.isfinite(1 / per_second) and math.isfinite(per_second)):
        raise InputError(f"--arrivals poisson:{rate}: expected requests per second above 0, such as poisson:2.5")
    random, at, times = Random(seed), 0.0, {}
    for request in requests:
        at += random.expovariate(per_second)
        times[request] = at
    return times


def _from_file(path: Path, requests: set[int]) -> dict[int, float]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(
            f"--arrivals {path}: cannot be read ({reason}); give trace, poisson:RATE or a JSONL file"
        ) from None
    times: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            request, arrival = _parse(line, f"{path}, line {number}")
            if request not in requests:
                raise InputError(f"{path}, line {number}: the trace has no request {request}; remove the line")
            if request in times:
                raise InputError(f"{path}, line {number}: request {request} arrives a second time; keep one line")
            times[request] = arrival
    return times


def _parse(line: str, where: str) -> tuple[int, float]:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f'{where}: expected a JSON object such as {{"request": 3, "arrival_s": 0.25}}')
    request, arrival = values.get("request"), values.get("arrival_s")
    if not isinstance(request, int) or isinstance(request, bool):
        raise InputError(f"{where}: request: expected the whole number of a request, found {request!r}")
    if not isinstance(arrival, (int, float)) or isinstance(arrival, bool) or not 0 <= arrival < LATEST_S:
        raise InputError(f"{where}: arrival_s: expected seconds from 0 to {LATEST_S:g}, found {arrival!r}")
    return request, float(arrival)
