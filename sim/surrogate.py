"""Surrogate routing: made up for a model of which nothing was recorded, as local in time as recorded models are.

What decides a cache's fate is how recently an expert that is needed was used before: its position in its layer's
list of experts, the most recent first (LRU stack distance; Mattson et al. 1970, IBM Systems Journal 9). A cache of C
experts hits exactly the needs at positions below C, so the shares of positions are the LRU hit curve.
`locality.json` holds those shares for recorded models (benchmarks/locality.py measures them). Here they are read
as a function of position / experts, and tokens are drawn that have them: k distinct positions per token and layer.
Everything else is without structure: no expert is popular in the long run, layers know nothing of each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.model_spec import ModelSpec
from ..traces.trace import DECODE, PREFILL, Request, Trace, TraceMeta, expert_dtype

TABLE = Path(__file__).with_name("locality.json")
GRID = np.linspace(0.0, 1.0, 257)  # resident fractions at which curves of different models are averaged


@dataclass(frozen=True)
class Locality:
    """`hits` [257]: share of needs that an LRU cache of each fraction of `GRID` hits, over a model's own layers."""

    name: str  # low, middle or high
    sources: tuple[str, ...]
    hits: NDArray[np.float64]


def reuse(trace: Trace) -> NDArray[np.float64]:
    """[E]: mean number of a decode row's needs at each position of its layer's list; the sum is the mean of k.

    Every step moves its whole set to the front, the highest id foremost, as the policy `lru` with ties does. Only
    steps of decode rows are counted. Lists begin in a random order (seed 0), so that an expert's first use counts as
    found anywhere among those not yet seen. Raises ValueError for a trace without decode steps.
    """
    experts, starts = trace.meta.model.experts, trace.step_starts
    layers = trace.experts.shape[1]
    stack = _shuffled(np.random.default_rng(0), layers, experts)
    found, counted, of_layer = np.zeros(experts), 0, np.arange(layers)[:, None]
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        used = np.zeros((layers, experts + 1), np.bool_)
        for ids in trace.experts[first:last]:
            used[of_layer, np.minimum(ids, experts)] = True
        at = np.take_along_axis(used, stack, 1)
        if (trace.phase[first:last] == DECODE).all():
            found += at.sum(0)
            counted += layers
        order = np.argsort(np.where(at, -1 - stack, 0), axis=1, kind="stable")
        stack = np.take_along_axis(stack, order, 1)
    if not counted:
        raise ValueError("the trace holds no decode steps")
    return found / counted


def localities(without: str | None = None) -> tuple[Locality, Locality, Locality]:
    """Low, middle and high: the recording that an LRU cache serves worst, the mean of all, the one it serves best.

    Ranked by the area under the hit curve. `without` leaves one recording out, to see how the others predict it.
    """
    sources = [source for source in load_sources() if source["name"] != without]
    curves = {str(source["name"]): _curve(source["share"]) for source in sources}
    ranked = sorted(curves, key=lambda name: (float(curves[name].sum()), name))
    middle = np.mean([curves[name] for name in ranked], axis=0)
    return (
        Locality("low", (ranked[0],), curves[ranked[0]]),
        Locality("middle", tuple(ranked), middle),
        Locality("high", (ranked[-1],), curves[ranked[-1]]),
    )


def load_sources() -> list[dict[str, Any]]:
    """The recordings of `locality.json`: name, model, counts, licence, and `share` [E] of needs at each position."""
    sources: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["sources"]
    return sources


def _curve(share: Sequence[float]) -> NDArray[np.float64]:
    hits = np.concatenate(([0.0], np.cumsum(share)))
    return np.interp(GRID, np.linspace(0.0, 1.0, len(hits)), hits / hits[-1])


def positions_wanted(locality: Locality, experts: int, top_k: int) -> NDArray[np.float64]:
    """[E]: how often a token needs the expert at each position; the sum is `top_k`, none is above 1.

    Where the curve asks for more than one expert at a position, the rest goes to the positions behind it, and what
    finds no room there to those before it, last first.
    """
    hits = np.interp(np.arange(experts + 1) / experts, GRID, locality.hits)
    wanted, owed = np.diff(hits) / hits[-1] * top_k, 0.0
    for position in range(experts):
        owed += wanted[position]
        wanted[position] = min(1.0, owed)
        owed -= wanted[position]
    for position in range(experts - 1, -1, -1):
        back = min(1.0 - wanted[position], owed)
        wanted[position] += back
        owed -= back
    return wanted


def surrogate(model: ModelSpec, locality: Locality, prompt: int, answer: int, seed: int = 0) -> Trace:
    """One request: a `prompt` (one step), then `answer` decode tokens, routed at this locality; seeded."""
    layers, experts, top_k = len(model.moe_layers), model.experts, model.top_k
    rows, rng = prompt + answer, np.random.default_rng(seed)
    wanted = positions_wanted(locality, experts, top_k)
    stack = _shuffled(rng, layers, experts)
    chosen = np.stack([_draw(rng, wanted, rows, top_k) for _ in range(layers)], axis=1)  # [N, L, E]
    ids = np.empty((rows, layers, top_k), expert_dtype(experts))
    for row in range(rows):
        used = stack[chosen[row]].reshape(layers, top_k)
        used = -np.sort(-used, axis=1)
        ids[row] = used
        stack = np.concatenate((used, stack[~chosen[row]].reshape(layers, experts - top_k)), axis=1)
    step = np.maximum(0, np.arange(rows) - prompt + 1).astype(np.int32)
    made = {"device": "none", "routing": f"surrogate, {locality.name} locality, seed {seed}: not recorded"}
    return Trace(
        TraceMeta(model, (Request(0, prompt, answer),), made, "none: made up"),
        step,
        np.zeros(rows, np.int32),
        np.arange(rows, dtype=np.int32),
        np.full(rows, -1, np.int32),
        np.where(step > 0, DECODE, PREFILL).astype(np.int8),
        np.zeros(rows, np.int16),
        np.zeros(rows, np.uint8),
        ids,
    )


def _draw(rng: np.random.Generator, wanted: NDArray[np.float64], rows: int, top_k: int) -> NDArray[np.bool_]:
    """[rows, E]: `top_k` positions each, every one with its wanted frequency.

    Systematic sampling over a random order (Madow 1949, Annals of Mathematical Statistics 20): exact frequencies.
    """
    order = np.argsort(rng.random((rows, len(wanted)), np.float32), axis=1, kind="stable")
    reached = np.cumsum(wanted[order], axis=1)
    reached *= top_k / reached[:, -1:]
    reached[:, -1] = top_k
    ticks = np.floor(reached + 0.999999 * rng.random((rows, 1))).astype(np.int64)
    taken = np.diff(ticks, axis=1, prepend=0) > 0
    chosen = np.zeros((rows, len(wanted)), np.bool_)
    np.put_along_axis(chosen, order, taken, axis=1)
    short = np.flatnonzero(chosen.sum(1) != top_k)  # rounding let one position pass two ticks
    for row in short.tolist():
        free = np.flatnonzero(~chosen[row])
        chosen[row, free[np.argsort(-wanted[free], kind="stable")[: top_k - int(chosen[row].sum())]]] = True
    return chosen


def _shuffled(rng: np.random.Generator, layers: int, experts: int) -> NDArray[np.int64]:
    return np.stack([rng.permutation(experts) for _ in range(layers)]).astype(np.int64)
