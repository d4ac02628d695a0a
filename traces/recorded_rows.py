"""From the bytes of one recorded forward pass to rows of the trace: live tokens only, ids in rank order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .host_ring import unpack
from .trace import IMAGE, PREFILL

if TYPE_CHECKING:
    from .recorder import Step

Array = NDArray[Any]


@dataclass
class Sequences:
    """The sequences of one batch, as known when their rows are made (passes arrive in order)."""

    requests: Array  # [B]
    position: Array  # [B], of the next token
    finished: Array  # [B] bool: its last token has been produced; what the model computes after that is not traced
    fresh: bool = True  # its decoder has not run yet


@dataclass(frozen=True)
class RowBuilder:
    """Makes rows of steps. `layers` L, `distances` D and `width` K' give the shape of the lookahead column."""

    layers: int
    distances: int
    width: int
    weights: bool
    lookahead_weights: bool
    stop_tokens: list[int]
    image_tokens: list[int]

    def rows(self, step: Step, payload: Array, facts: list[dict[str, Any]]) -> dict[str, Array]:
        """Columns [n, ...] under the trace's names, by request, then position; counts tokens into `facts`."""
        batch, length = step.shape
        columns = unpack(payload, step.layout)
        tokens = columns.pop("token", np.full(batch * length, -1, np.int32)).reshape(batch, length)
        live = columns.pop("live", np.ones(batch * length, np.uint8)).reshape(batch, length) != 0
        live &= ~self._finished(step, tokens, facts)[:, None]
        sequences, counts = step.sequences, live.sum(1)
        positions = sequences.position[:, None] + np.cumsum(live, 1) - 1
        sequences.position = sequences.position + counts
        for request, count in zip(sequences.requests, counts, strict=True):
            facts[request]["prefill" if step.phase == PREFILL else "decode"] += int(count)
        count, token = int(counts.sum()), tokens[live]
        scalars = {
            "step": np.full(count, step.index, np.int32),
            "request": np.repeat(sequences.requests, counts).astype(np.int32),
            "position": positions[live].astype(np.int32),
            "token": token,
            "phase": np.full(count, step.phase, np.int8),
            "flags": _any_of(token, self.image_tokens) * np.uint8(IMAGE),
        }
        if count < live.size:
            kept = live.reshape(-1)
            columns = {name: column[kept] for name, column in columns.items()}
        return scalars | self._routing(step, columns)

    def _finished(self, step: Step, tokens: Array, facts: list[dict[str, Any]]) -> Array:
        """[B] bool: sequences that ended before this pass. A stop token that is fed back ended its sequence."""
        sequences = step.sequences
        start_token = sequences.fresh and step.stack.role == "cross"  # some decoders start from a stop token
        if step.phase == PREFILL:
            sequences.finished = np.zeros_like(sequences.finished)
        elif not start_token:
            sequences.finished = sequences.finished | _any_of(tokens, self.stop_tokens).any(1)
            for request in sequences.requests[sequences.finished]:
                facts[request].setdefault("stop_reason", "eos")
        sequences.fresh = sequences.fresh and step.stack.role == "encoder"
        return sequences.finished

    def _routing(self, step: Step, columns: dict[str, Array]) -> dict[str, Array]:
        """Array columns over all MoE layers; those of another stack are absent."""
        here = [layer.index for layer in step.stack.layers]
        ids, weights = ranked(columns["experts"], columns["weights"])
        made = {"experts": self._over_layers(ids, here, np.iinfo(ids.dtype).max)}
        if self.weights:
            made["weights"] = self._over_layers(weights, here, 0)
        if "probs" in columns:
            made["probs"] = self._over_layers(columns["probs"], here, 0)
        if "lookahead" in columns:
            chosen, top_k = (columns["lookahead"], columns["lookahead_weights"]), ids.shape[-1]
            first = ranked(*(part[..., :top_k] for part in chosen))  # what follows was not chosen: it stays behind
            made |= self._lookahead(
                step, *(np.concatenate((a, b[..., top_k:]), -1) for a, b in zip(first, chosen, strict=True))
            )
        return made

    def _over_layers(self, values: Array, here: list[int], fill: int) -> Array:
        """[n, len(here), ...] -> [n, L, ...]."""
        if len(here) == self.layers:
            return values
        full = np.full((values.shape[0], self.layers, *values.shape[2:]), fill, values.dtype)
        full[:, here] = values
        return full

    def _lookahead(self, step: Step, ids: Array, scores: Array) -> dict[str, Array]:
        """[n, guesses, K'] -> [n, L+1, D, K'], absent past the last layer."""
        shape = (len(ids), self.layers + 1, self.distances, self.width)
        sources, distances = (list(part) for part in zip(*step.places, strict=True))
        slots = (slice(None), sources, [distance - 1 for distance in distances])
        made = {"lookahead": np.full(shape, np.iinfo(ids.dtype).max, ids.dtype)}
        made["lookahead"][slots] = ids
        if self.lookahead_weights:
            made["lookahead_weights"] = np.zeros(shape, np.float16)
            made["lookahead_weights"][slots] = scores
        return made


def ranked(ids: Array, weights: Array) -> tuple[Array, Array]:
    """Ids [..., K] in rank order: by weight, largest first.

    Where the weights descend already the router's own order stays; the rest is sorted, ties to the lower id.
    """
    loose = (weights[..., 1:] > weights[..., :-1]).any(-1)
    if loose.any():
        order = np.lexsort((ids[loose], -weights[loose].astype(np.float32)), axis=-1)
        ids, weights = ids.copy(), weights.copy()
        ids[loose] = np.take_along_axis(ids[loose], order, -1)
        weights[loose] = np.take_along_axis(weights[loose], order, -1)
    return ids, weights


def _any_of(tokens: Array, listed: list[int]) -> NDArray[np.bool_]:
    """Which tokens are in a short list: `np.isin` costs ten times as much for one step's few tokens."""
    found = np.zeros(tokens.shape, np.bool_)
    for token in listed:
        found |= tokens == token
    return found
