"""Stride predictor: a small network per layer, from its routing to the experts two layers ahead (ProMoE, 2410.22134).

ProMoE feeds a two-layer perceptron per layer with the hidden state, and finds a stride of 2 best. Here the input is
what every trace has, the layer's choice: each chosen expert's gate weight (1 where the trace has none), and the
`sketch` of the router's input where one is recorded for every layer. Width, rounds and step size are chosen here.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import Trace
from .fitted import Fitted, request_digests
from .predictor import Predictions, Predictor
from .recall import popular, recall_table

STRIDE = 2
HIDDEN = 128
ROUNDS = 20


class Stride(Predictor):
    """After layer l the 2k likeliest experts of layer l + 2, with the chance that each is chosen."""

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        layers = trace.experts.shape[1]
        if layers <= STRIDE:
            raise InputError(f"stride: the trace has {layers} MoE layers; predicting {STRIDE} ahead needs more")
        networks = [_fit(_inputs(trace, layer), _chosen(trace, layer + STRIDE)) for layer in range(layers - STRIDE)]
        arrays = {name: np.stack([network[name] for network in networks]) for name in networks[0]}
        settings = {
            "stride": STRIDE, "layers": layers, "experts": trace.meta.model.experts,
            "weights": trace.weights is not None, "sketch": _sketched(trace),
        }  # fmt: skip
        metrics = recall_table(_predict(arrays, settings, judged), judged)
        if judged.rows:
            said = popular(trace, judged, tuple(range(layers - STRIDE)), (STRIDE,))
            metrics["popularity"] = recall_table(said, judged)["overall"]
        one = _inputs(trace, 0)[:1]
        return Fitted(
            "stride", arrays, settings, metrics, tuple(request_digests(trace).values()), _seconds(arrays, one)
        )

    def predict(self, trace: Trace) -> Predictions:
        fitted = self.fitted()
        found = {
            "layers": trace.experts.shape[1], "experts": trace.meta.model.experts,
            "weights": trace.weights is not None, "sketch": _sketched(trace),
        }  # fmt: skip
        for name, value in found.items():
            if fitted.settings[name] != value:
                raise InputError(
                    f"{self.file}: fitted to a trace with {name} {fitted.settings[name]}, and this one has {value}; "
                    "train it on a trace of this kind"
                )
        return _predict(fitted.arrays, fitted.settings, trace)


def _predict(arrays: dict[str, NDArray[np.float32]], settings: dict[str, Any], trace: Trace) -> Predictions:
    stride, experts = settings["stride"], settings["experts"]
    moments = tuple(range(settings["layers"] - stride))
    width = min(experts, 2 * trace.experts.shape[2])
    ids = np.empty((trace.rows, len(moments), 1, width), trace.experts.dtype)
    chances = np.empty(ids.shape, np.float16)
    for layer in moments:
        probability = _forward({name: array[layer] for name, array in arrays.items()}, _inputs(trace, layer))
        best = np.argsort(-probability, axis=1, kind="stable")[:, :width]
        ids[:, layer, 0] = best
        chances[:, layer, 0] = np.take_along_axis(probability, best, axis=1)
    return Predictions(moments, (stride,), ids, chances)


def _sketched(trace: Trace) -> int:
    """Sketch values per layer that are inputs; 0 when there are none, or not for every layer."""
    usable = trace.sketch is not None and trace.sketch.shape[1] == trace.experts.shape[1]
    return int(trace.sketch.shape[2]) if usable and trace.sketch is not None else 0


def _inputs(trace: Trace, layer: int) -> NDArray[np.float32]:
    """[N, E (+ s)]: what each token's router chose at `layer`, by gate weight, and the sketch of its input."""
    chosen = np.zeros((trace.rows, trace.meta.model.experts + 1), np.float32)
    ids = np.minimum(trace.experts[:, layer].astype(np.int64), trace.meta.model.experts)
    weights = np.ones(ids.shape, np.float32) if trace.weights is None else trace.weights[:, layer].astype(np.float32)
    np.put_along_axis(chosen, ids, weights, axis=1)
    if not _sketched(trace) or trace.sketch is None:
        return chosen[:, :-1]
    return np.concatenate((chosen[:, :-1], trace.sketch[:, layer].astype(np.float32)), axis=1)


def _chosen(trace: Trace, layer: int) -> NDArray[np.int8]:
    """[N, E]: 1 for every expert chosen at `layer`."""
    chosen = np.zeros((trace.rows, trace.meta.model.experts + 1), np.int8)
    ids = np.minimum(trace.experts[:, layer].astype(np.int64), trace.meta.model.experts)
    np.put_along_axis(chosen, ids, np.int8(1), axis=1)
    return chosen[:, :-1]


def _fit(inputs: NDArray[np.float32], chosen: NDArray[np.int8]) -> dict[str, NDArray[np.float32]]:
    """A perceptron with one hidden layer, fitted by Adam to the multi-label log loss."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((HIDDEN,), batch_size=min(128, len(inputs)), learning_rate_init=2e-3, max_iter=ROUNDS,
                            alpha=1e-3, random_state=0)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of rounds is the stopping rule
        network.fit(inputs, chosen)
    (first, second), (bias, out) = network.coefs_, network.intercepts_
    named = {"first": first, "bias": bias, "second": second, "out": out}
    return {name: np.asarray(array, np.float32) for name, array in named.items()}


def _forward(network: dict[str, NDArray[np.float32]], inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, E] chances."""
    hidden = np.maximum(0, inputs @ network["first"] + network["bias"])
    return np.asarray(1 / (1 + np.exp(-(hidden @ network["second"] + network["out"]))), np.float32)


def _seconds(arrays: dict[str, NDArray[np.float32]], one: NDArray[np.float32]) -> float:
    """Of one layer for one token, the least of a few measurements."""
    network, calls = {name: array[0] for name, array in arrays.items()}, 100
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            np.argsort(-_forward(network, one), axis=1, kind="stable")
        times.append((time.perf_counter() - begin) / calls)
    return min(times)
