"""A routing trace in memory: one row per token per forward pass, in execution order (DESIGN section 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model_spec import ModelSpec

FORMAT_VERSION = 1
PREFILL, DECODE = 0, 1
DRAFT, REJECTED, RECOMPUTED, IMAGE = 1, 2, 4, 8  # bits of `flags`

_HASH_LEAF = 1 << 22  # bytes of a column hashed as one piece, so that threads share the work


@dataclass(frozen=True)
class Request:
    """What is known about one sequence beyond its rows."""

    id: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    arrival_s: float | None = None
    stop_reason: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class TraceMeta:
    """The JSON document in the file's schema metadata, key `moeflow`."""

    model: ModelSpec
    requests: tuple[Request, ...] = ()
    recorded: dict[str, Any] = field(default_factory=dict)  # device, software versions, prompts, sampling
    licence: str = ""
    lookahead_distances: tuple[int, ...] = ()  # ascending, at least 1

    def __post_init__(self) -> None:
        if any(b <= a for a, b in pairwise((0, *self.lookahead_distances))):
            raise ValueError(f"lookahead distances {list(self.lookahead_distances)} must ascend from at least 1")
        if len({request.id for request in self.requests}) < len(self.requests):
            raise ValueError("two requests have the same id")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is unknown about a request is left out."""
        requests = [{k: v for k, v in vars(request).items() if v is not None} for request in self.requests]
        return {
            "model": self.model.to_dict(),
            "requests": requests,
            "recorded": self.recorded,
            "licence": self.licence,
            "lookahead_distances": list(self.lookahead_distances),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TraceMeta:
        """The inverse of `to_dict`. Raises KeyError, ValueError or TypeError for what it lacks."""
        return cls(
            model=ModelSpec.from_dict(values["model"]),
            requests=tuple(Request(**request) for request in values["requests"]),
            recorded=dict(values["recorded"]),
            licence=str(values["licence"]),
            lookahead_distances=tuple(int(distance) for distance in values["lookahead_distances"]),
        )


@dataclass(frozen=True)
class Trace:
    """Decoded arrays. N rows, L MoE layers, top-K, E experts, D lookahead distances with K' >= K predictions.

    `experts` is uint8 while E <= 255, else uint16; all ones mark an absent entry.
    `lookahead[n, s, i]`, s = 0 the embedding and s = l + 1 MoE layer l's router input, holds what MoE layer
    s - 1 + lookahead_distances[i] would choose; entries past the last layer are absent.
    """

    meta: TraceMeta
    step: NDArray[np.int32]  # [N]
    request: NDArray[np.int32]  # [N]
    position: NDArray[np.int32]  # [N]
    token: NDArray[np.int32]  # [N], -1 = unknown
    phase: NDArray[np.int8]  # [N], 0 prefill, 1 decode
    attempt: NDArray[np.int16]  # [N]
    flags: NDArray[np.uint8]  # [N]
    experts: NDArray[np.unsignedinteger[Any]]  # [N, L, K]
    weights: NDArray[np.float16] | None = None  # [N, L, K]
    step_ns: NDArray[np.int64] | None = None  # [N, 2]
    lookahead: NDArray[np.unsignedinteger[Any]] | None = None  # [N, L+1, D, K']
    lookahead_weights: NDArray[np.float16] | None = None  # [N, L+1, D, K']
    candidates: NDArray[np.unsignedinteger[Any]] | None = None  # [N, L, M]
    candidate_logits: NDArray[np.float16] | None = None  # [N, L, M]
    probs: NDArray[np.float16] | None = None  # [N, L, E]
    embedding: NDArray[np.float16] | None = None  # [N, s]
    sketch: NDArray[np.float16] | None = None  # [N, n, s]
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)  # columns this version does not know

    @cached_property
    def content_sha256(self) -> str:
        """SHA-256 of arrays and metadata, in hex: the same whatever the compression. Computed once."""
        digest = hashlib.sha256(json.dumps(self.meta.to_dict(), sort_keys=True, allow_nan=False).encode())
        with ThreadPoolExecutor() as pool:
            for name, array in sorted(self.columns.items()):
                digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
                for leaf in pool.map(_sha256, _leaves(array)):
                    digest.update(leaf)
        return digest.hexdigest()

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What others have worked out from these arrays, by a name of theirs, kept as long as the trace."""
        return {}

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Every array that is present, by column name, in the order of the format; extra ones last."""
        own = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("meta", "extra"))
        return {name: array for name, array in own if array is not None} | self.extra

    def of_requests(self, requests: Collection[int]) -> Trace:
        """The rows of these requests alone, and their records."""
        kept = np.isin(self.request, list(requests))
        own = {name: array[kept] for name, array in self.columns.items() if name not in self.extra}
        extra = {name: array[kept] for name, array in self.extra.items()}
        records = tuple(record for record in self.meta.requests if record.id in set(requests))
        return replace(self, meta=replace(self.meta, requests=records), extra=extra, **own)

    def reordered(self, order: NDArray[np.int64], step: NDArray[np.int32]) -> Trace:
        """The rows in another order [N], as passes numbered `step` [N]; routing is taken to stay as it was.

        How long the recorded passes took says nothing about these, so `step_ns` is left out.
        """
        own = {name: array[order] for name, array in self.columns.items() if name not in self.extra}
        extra = {name: array[order] for name, array in self.extra.items()}
        return replace(replace(self, meta=self.meta, extra=extra, **own), step=step.astype(np.int32), step_ns=None)

    @property
    def rows(self) -> int:
        return len(self.step)

    @property
    def absent(self) -> int:
        """The id that marks an absent entry."""
        return int(np.iinfo(self.experts.dtype).max)

    @property
    def step_starts(self) -> NDArray[np.int64]:
        """[S+1]: row index where each step starts, and the number of rows at the end."""
        if not self.rows:
            return np.zeros(1, np.int64)
        changes = np.flatnonzero(np.diff(self.step)) + 1
        return np.concatenate(([0], changes, [self.rows])).astype(np.int64)


def _leaves(array: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return (data[start : start + _HASH_LEAF] for start in range(0, data.size, _HASH_LEAF))


def _sha256(data: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(data.data).digest()


def expert_dtype(experts: int) -> type[np.uint8] | type[np.uint16]:
    """uint8 while E <= 255 (255 marks absent), else uint16."""
    return np.uint8 if experts <= 255 else np.uint16
