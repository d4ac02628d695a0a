"""The routing path predictor: from token ids alone, every layer's experts before the first layer runs
(ExpertFlow, He et al., 2410.17954, section on the routing path predictor).

An encoder reads the prompt, a decoder the tokens decoded so far, the current one included: it foresees layers, not
tokens. A prompt's own rows are predicted from the encoder, which sees the whole chunk that a step brings and nothing
of later ones. Network and training: `rpp_network`.
"""

from __future__ import annotations

from importlib import import_module
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import DECODE, Trace
from .fitted import Fitted, request_digests
from .next_gate import NextGate
from .predictor import Predictions, Predictor
from .recall import recall_table

if TYPE_CHECKING:
    from .rpp_network import Network

AREA = 1 << 18  # rows squared, summed over the requests that are predicted at once: bounds memory
VALIDATING = 10  # every tenth request chooses when to stop, the paper's 90/10 split

Rows = tuple[NDArray[np.int64], NDArray[np.int64]]  # of one request: its prompt's and its decoded rows


class RPP(Predictor):
    """Said at step start about every MoE layer: the 2k likeliest experts of each token, with their probabilities."""

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        """Fit on `trace`. Metrics also name what popularity, a table by token id and the next gates reach."""
        network_module = _network_module()
        _check_tokens(trace)
        model = trace.meta.model
        vocabulary = max(model.vocabulary, int(trace.token.max()) + 1)
        shape = network_module.Shape(vocabulary, len(model.moe_layers), model.experts)
        requests = _requests(trace)
        validating = requests[VALIDATING - 1 :: VALIDATING]
        kept = [request for i, request in enumerate(requests) if i % VALIDATING != VALIDATING - 1]
        network = network_module.fit(shape, network_module.Training(), kept, validating, _columns(trace), _paths(trace))
        return Fitted(
            "rpp", network_module.to_arrays(network), network_module.shape_settings(shape),
            _metrics(network, trace, judged), tuple(request_digests(trace).values()), _seconds(network, trace),
        )  # fmt: skip

    def predict(self, trace: Trace) -> Predictions:
        """Raises InputError when the trace has no token ids or another geometry than the fitted file."""
        network_module = _network_module()
        fitted, model = self.fitted(), trace.meta.model
        try:
            network = network_module.from_arrays(fitted.settings, fitted.arrays)
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.file}: weights and sizes do not match ({reason}); train it again") from None
        _check_tokens(trace)
        own, asked = (network.shape.layers, network.shape.experts), (len(model.moe_layers), model.experts)
        if own != asked:
            raise InputError(
                f"{self.file}: fitted to {own[0]} MoE layers of {own[1]} experts, but the trace has {asked[0]} of "
                f"{asked[1]}; train on a trace of its model"
            )
        if trace.rows and int(trace.token.max()) >= network.shape.vocabulary:
            raise InputError(
                f"{self.file}: the trace's token id {int(trace.token.max())} lies outside the vocabulary of "
                f"{network.shape.vocabulary}; train on a trace of its tokenizer"
            )
        return _predict(network, trace)


def _network_module() -> ModuleType:
    try:
        return import_module(".rpp_network", __package__)
    except ModuleNotFoundError as error:
        raise InputError(f"predict.kind rpp needs {error.name}: pip install 'moeflow[train]'") from None


def _check_tokens(trace: Trace) -> None:
    if trace.rows and int(trace.token.min()) < 0:
        raise InputError(
            "predict.kind rpp: the trace has no token ids, which this predictor reads; record one with `trace record`"
        )


def _requests(trace: Trace) -> list[Rows]:
    """Rows of every request, in the order of their ids."""
    order = np.argsort(trace.request, kind="stable")
    _, first = np.unique(trace.request[order], return_index=True)
    decode = trace.phase == DECODE
    return [(rows[~decode[rows]], rows[decode[rows]]) for rows in np.split(order, first[1:]) if len(rows)]


def _columns(trace: Trace) -> dict[str, NDArray[np.int64]]:
    return {name: getattr(trace, name).astype(np.int64) for name in ("token", "position", "step")}


def _paths(trace: Trace) -> NDArray[np.bool_]:
    """[N, L, E]: the routing path of every row."""
    rows, layers, _ = trace.experts.shape
    experts = trace.meta.model.experts
    paths = np.zeros((rows, layers, experts + 1), np.bool_)
    np.put_along_axis(paths, np.minimum(trace.experts.astype(np.int64), experts), True, axis=2)
    return paths[:, :, :experts]


def _predict(network: Network, trace: Trace) -> Predictions:
    from .rpp_network import probabilities

    model = trace.meta.model
    layers, width = len(model.moe_layers), min(model.experts, 2 * model.top_k)
    experts = np.zeros((trace.rows, 1, layers, width), trace.experts.dtype)
    chance = np.zeros((trace.rows, 1, layers, width), np.float16)
    columns = _columns(trace)
    for requests in _batches(_requests(trace)):
        probability, rows = probabilities(network, requests, columns)
        best = np.argsort(-probability, axis=2, kind="stable")[:, :, :width]
        experts[rows, 0] = best
        chance[rows, 0] = np.take_along_axis(probability, best, axis=2)
    return Predictions((-1,), tuple(range(1, layers + 1)), experts, chance)


def _batches(requests: list[Rows]) -> list[list[Rows]]:
    """Requests of similar length together, so that padding is little and memory bounded."""
    batches: list[list[Rows]] = []
    longest = 0
    for request in sorted(requests, key=lambda rows: len(rows[0]) + len(rows[1])):
        longest = max(longest, len(request[0]) + len(request[1]) + 1)
        if batches and (len(batches[-1]) + 1) * longest**2 <= AREA:
            batches[-1].append(request)
        else:
            batches.append([request])
            longest = len(request[0]) + len(request[1]) + 1
    return batches


def _metrics(network: Network, trace: Trace, judged: Trace) -> dict[str, Any]:
    """Recall on requests that were not fitted on, of the predictor and of what costs nothing to train."""
    if not judged.rows:
        return {}
    said = {
        "rpp": _predict(network, judged),
        "popularity": _popular(trace, judged),
        "token table": _table(trace, judged),
    }
    if judged.lookahead is not None:
        said["next gate"] = NextGate().predict(judged)
    tables = {name: recall_table(predictions, judged) for name, predictions in said.items()}
    return {
        "requests judged": len(np.unique(judged.request)),
        **{name: table["overall"] for name, table in tables.items()},
        "next gate by distance": tables.get("next gate", {}).get("by_distance", {}),
        "rpp by layer": {
            str(int(distance) - 1): figures["recall@k"] for distance, figures in tables["rpp"]["by_distance"].items()
        },
    }


def _popular(trace: Trace, judged: Trace) -> Predictions:
    """The most used experts of every layer, whatever the token."""
    share = _paths(trace).mean(axis=0)
    return _top(np.broadcast_to(share, (judged.rows, *share.shape)), judged)


def _table(trace: Trace, judged: Trace) -> Predictions:
    """What each token id was routed to, popularity counting as one more occurrence."""
    paths = _paths(trace)
    share = paths.mean(axis=0)
    ids, index = np.unique(trace.token, return_inverse=True)
    counts = np.zeros((len(ids) + 1, *share.shape))
    np.add.at(counts, index, paths)
    counts += share
    at = np.searchsorted(ids, judged.token)
    known = ids[np.minimum(at, len(ids) - 1)] == judged.token
    return _top(counts[np.where(known, at, len(ids))], judged)


def _top(scores: NDArray[Any], trace: Trace) -> Predictions:
    """Predictions at step start from scores [N, L, E]."""
    layers, width = scores.shape[1], min(scores.shape[2], 2 * trace.meta.model.top_k)
    best = np.argsort(-scores, axis=2, kind="stable")[:, None, :, :width].astype(trace.experts.dtype)
    return Predictions((-1,), tuple(range(1, layers + 1)), best, np.ones(best.shape, np.float16))


def _seconds(network: Network, trace: Trace) -> float:
    """Time of one pass over the longest request, every part of it, nothing kept from the token before.

    The shortest of 30: whatever else a machine does meanwhile is not the predictor's time.
    """
    from .rpp_network import probabilities

    longest = max(_requests(trace), key=lambda rows: len(rows[0]) + len(rows[1]))
    columns, times = _columns(trace), []
    for _ in range(30):
        began = perf_counter()
        probabilities(network, [longest], columns)
        times.append(perf_counter() - began)
    return min(times)
