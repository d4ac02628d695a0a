"""KTransformers: experts placed on the GPUs or computed by the CPU, by share and by how they were chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from figures import Anchor
from moeflow.hwprofiles.profile import Hardware
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.models import load_model_spec
from replays import Predicted, all_resident, host_layers, machine, spread

MACHINES = ("xeon6454s-4x4090", "xeon6454s-layers")
POPULARITY = Path(__file__).with_name("popularity.json")


# Weights: a linear layer's projections have 33.7 M and a gated full one's 27.3 M where the spec counts 18.9 M.
UNDESCRIBED = 36 * 14.8e6 + 12 * 8.4e6


def _undescribed_ms(hardware: Hardware) -> float:
    """Milliseconds per token that the device needs for weights of one byte that the spec leaves out."""
    return 1e3 * UNDESCRIBED / (hardware.device.memory_bandwidth * hardware.device.memory_achieved)


def fp8() -> ModelSpec:
    return replace(load_model_spec("qwen3-next-80b-a3b"), dtype="float8", expert_dtype="float8")


def replay(anchor: Anchor) -> dict[str, Predicted]:
    return _replay(anchor, machine(MACHINES[0]))


def replay_layers(anchor: Anchor) -> dict[str, Predicted]:
    """The same with layers split over the cards in place of tensor parallel."""
    return _replay(anchor, machine(MACHINES[1]))


def _replay(anchor: Anchor, hardware: Hardware) -> dict[str, Predicted]:
    """random and uniform are one: at batch 1 they differ by chance only. Front-loading fills whole layers.

    What `frequency` and `dynamic` gain depends on popularity, which surrogate routing has none of. They are replayed
    as the uniform placement that covers as many needs as the popular experts of recorded models do.
    """
    model = fp8()
    layers = len(model.moe_layers)
    recordings = json.loads(POPULARITY.read_text(encoding="utf-8")).values()
    predicted = {}
    for name, figure in anchor.figures.items():
        if figure.ratio:
            continue
        kind, _, percent = name.partition("-")
        share = int(percent) / 100
        if kind == "all":
            predicted[name] = all_resident(hardware, model)
        elif kind == "front" or not share:
            predicted[name] = host_layers(hardware, model, layers - round(share * layers))
        elif kind in ("random", "uniform"):
            predicted[name] = spread(hardware, model, share)
        else:
            found = [recording[kind][f"{share:g}"] for recording in recordings]
            rates = [spread(hardware, model, covered).value or 0.0 for covered in (sum(found) / len(found), *found)]
            predicted[name] = Predicted.over(rates[0], rates)
    return predicted


def why(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    def missing(*kinds: str) -> str:
        """Milliseconds per token that the prediction lacks, least to most."""
        lacks = [
            1e3 / figure.low - 1e3 / (predicted[name].value or 1.0)
            for name, figure in anchor.figures.items()
            if not figure.ratio and name.partition("-")[0] in kinds and not name.endswith("-0")
        ]
        return f"{min(lacks):.1f} to {max(lacks):.1f} ms" if len(lacks) > 1 else f"{lacks[0]:.1f} ms"

    figures = anchor.figures
    full = predicted["dynamic-70"].value or 0.0

    def _times(name: str) -> str:
        """How much faster than uniform at the same share."""
        share = name.partition("-")[2]
        return f"{(predicted[name].value or 0.0) / (predicted[f'uniform-{share}'].value or 1.0):.2f} x"

    return f"""\
*A constant is missing, not a slope.* Per token the prediction is too short by {missing("front")} with
front-loading at
every share, by {missing("all")} with everything on the GPUs, and by {missing("uniform", "random")} where each
layer is
mixed. Tensor parallel adds two all-reduces to each of 48 layers, through host memory on cards without peer access; at
30 us each they would be 2.9 ms. The simulator has no tensor parallel and charges none. They may cost more than that:
what a kernel takes within a graph is overcharged (see imp below), which hides a part.

*Mixed layers are charged too much, whole layers too little,* so front-loading's advantage is overstated and every
other
placement stops short of {full:.0f} tok/s however few experts are left to the CPU. In the model a layer with any host
expert pays the whole handshake (80 us, from the cost of host functions), the decision (10 us) and a round trip of its
activations in series. KTransformers decides nothing here and submits first, so that the GPU's own experts run
meanwhile.

*Frequency and dynamic* gain over uniform what recorded popularity says at 30 % ({_times("frequency-30")} for
frequency,
published {figures["frequency-gain-30"]}; {_times("dynamic-30")} for dynamic, published {figures["dynamic-gain-30"]}),
and cannot at 70 %, where that ceiling stops them. That dynamic gains {figures["dynamic-gain-10"].low - 1:.0%} at
10 % already lies at the edge of what four recordings allow: experts chosen in the prompt may serve the answer
better than half an answer serves its other half, or prefill is part of the published rate.

*Linear attention is priced as full.* The spec counts 0.6 of 80 billion weights too few for it, which take
{_undescribed_ms(machine(MACHINES[0])):.1f} ms per token here, and reads four times the keys and values."""


def why_layers(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    hardware, model = machine(MACHINES[1]), fp8()
    both = replace(hardware, host=replace(hardware.host, memory_bandwidth=2 * hardware.host.memory_bandwidth))
    twice = host_layers(both, model, len(model.moe_layers)).value or 0.0
    return f"""\
Replayed after the table above had been seen: tensor parallel is what four cards are usually given for. Nothing is added
here, and it is nearer with front-loading, with little and with everything on the GPUs; further off for popular experts
at 50 and 70 %, where the ceiling of mixed layers is lower still. So the constant that is missing above is what
all-reduces cost, or speed that four cards do not give to one token; the published figures do not tell the two apart.
The ceiling is wrong in both. Left out here:
{_undescribed_ms(hardware):.1f} ms of weights that the spec does not describe.

*The number of sockets* is as open: with both sockets' bandwidth the rate with nothing on the GPUs would be
{twice:.0f} tok/s here in place of {predicted["uniform-0"].value:.0f}."""
