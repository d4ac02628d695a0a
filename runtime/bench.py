"""Policies compared on one model in one run: the same forced routing, turn and turn about, everything resident too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..policies.policy import Policy
from ..traces.routers import MoeLayer
from ..traces.trace import DECODE, Trace
from .forced_routing import ForcedRouting, Turn, check_columns, turns_of
from .gates import distances
from .nvtx import nvtx_ranges
from .offload import Offload, served_layers
from .physical_limit import limit_seconds, link_rate
from .subject import Subject
from .timeline import Timeline

WARM = 4  # passes before the first measured run of a policy: machine code is made, memory touched. Chosen here
TIMELINE = 40  # passes that a timeline covers, as in the simulator
MOVED = ("demand", "stream", "prefetch", "wasted", "padding")

Values = dict[str, Any]


def bench(
    subject: Subject, name: str, trace: Trace, policies: Sequence[Policy], budget: Any, rounds: int = 3,
    report: Callable[[str], None] = lambda line: None, timeline: Callable[[Timeline], None] | None = None,
    nvtx: bool = False,
) -> Values:  # fmt: skip
    """Run `trace` on the model called `name` under each policy, `rounds` times in turn, each from a cold start.

    Returns plain values in SI units: per policy medians over rounds, and its pace against the first policy's and the
    resident model's as ratios within rounds. `timeline` is handed one of an extra run of the first policy.
    Raises InputError for a policy that reads what the trace lacks, and what `offload` raises.
    """
    runs: dict[str, list[Values]] = {policy.name: [] for policy in policies}
    if len(runs) < len(policies):
        raise InputError("--policy: two of the policies have the same name; give each of them once")
    for policy in policies:
        check_columns(trace, policy, distances(policy, len(trace.meta.model.moe_layers)))
    resident: list[Values] = []
    about, rate = Values(), 0.0
    for number in range(1, rounds + 1):
        with subject.resident() as model:
            if model is not None:
                report(f"round {number} of {rounds}: everything resident")
                resident.append(_resident(model, trace, subject.backend.device, warm=number == 1))
        for policy in policies:
            report(f"round {number} of {rounds}: {policy.name}")
            if number == 1:
                with subject.under(policy, budget) as offload:
                    rate = rate or link_rate(subject.backend, offload.layout.size)
                    about = _about(offload, name, trace)
                    _follow(offload, trace, WARM)
            with subject.under(policy, budget) as offload, nvtx_ranges(offload) if nvtx else nullcontext():
                runs[policy.name].append(_offloaded(offload, trace, rate))
    if timeline is not None:
        with subject.under(policies[0], budget) as offload, Timeline(offload).attached() as seen:
            _follow(offload, trace, TIMELINE)
            timeline(seen)
    first = runs[policies[0].name]
    return {
        "format": 1,
        **about,
        "budget": str(budget),
        "ram": subject.ram,
        "rounds": rounds,
        "link_bytes_per_s": rate,
        "resident": _times(resident) if resident else None,
        "policies": [_summary(own, first, resident, trace, about["row_bytes"], rate) for own in runs.values()],
        "notes": _notes(subject, trace, resident, runs),
    }


def _about(offload: Offload, name: str, trace: Trace) -> Values:
    """What is measured."""
    return {
        "model": offload.spec.to_dict() | {"name": name},
        "device": str(offload.backend.device),
        "threads": torch.get_num_threads(),
        "row_bytes": offload.layout.size,
        "trace": {
            "model": trace.meta.model.name,
            "sha256": trace.content_sha256,
            "requests": len(np.unique(trace.request)),
            "tokens": trace.rows,
            "passes": len(trace.step_starts) - 1,
        },
    }


def _resident(model: Any, trace: Trace, device: torch.device, warm: bool) -> Values:
    """One run of the model as transformers runs it."""
    layers, turns = served_layers(model), _turns(model, trace)
    if warm:
        drive(model, layers, ForcedRouting(trace, device), turns[:WARM])
    return _measured(drive(model, layers, ForcedRouting(trace, device), turns), turns)


def _follow(offload: Offload, trace: Trace, passes: int | None = None) -> tuple[list[float], list[Turn]]:
    """The trace's first passes on an offloaded model: their seconds, and what they were."""
    forced, turns = ForcedRouting(trace, offload.backend.device), _turns(offload.model, trace)[:passes]
    forced.told_to(offload)
    return drive(offload.model, offload.moe, forced, turns), turns


def _turns(model: Any, trace: Trace) -> list[Turn]:
    return turns_of(trace, int(model.config.get_text_config().vocab_size))


def _offloaded(offload: Offload, trace: Trace, rate: float) -> Values:
    """One run of the whole trace."""
    times = _measured(*_follow(offload, trace))
    offload.decisions.end()
    said = offload.statistics()
    copied = sum(said["bytes"][kind] for kind in MOVED if kind != "wasted") / rate
    hidden = 1 - said["exposed_wait_s"] / copied if copied and offload.backend.asynchronous else 0.0
    return {
        "name": offload.policy.name,
        "exactness": said["exactness"],
        "slots": said["slots"],
        **times,
        **{name: said[name] for name in ("hit", "late", "miss")},
        "wait_s_per_token": said["exposed_wait_s"] / trace.rows,
        "bytes_per_token": {kind: said["bytes"][kind] / trace.rows for kind in MOVED},
        "overlap": min(1.0, max(0.0, hidden)),
        "waves_per_layer": said["waves_per_layer"],
        "syncs_per_layer": said["syncs_per_layer"],
        "host_us_per_layer": {part: said[f"{part}_us_per_layer"] for part in ("sync", "decide", "compute")},
        "disk": said.get("disk"),
        "said": said["notes"],
        "decision_log_sha256": said["decision_log_sha256"],
    }


@torch.inference_mode()
def drive(model: Any, layers: tuple[MoeLayer, ...], forced: ForcedRouting, turns: Sequence[Turn]) -> list[float]:
    """Make the passes `turns`; returns the seconds of each, from the call to the next tokens on the host."""
    device, taken = forced.device, []
    cache, mask = None, torch.zeros(0)
    with forced.on(layers):
        for turn in turns:
            forced.begin(turn)
            if turn.fresh:
                cache, mask = None, turn.mask.to(device)
            else:
                mask = torch.cat((mask, turn.mask.to(device)), 1)
            given = {"input_ids": turn.tokens.to(device), "position_ids": turn.positions.to(device)}
            began = time.perf_counter()
            made = model(**given, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            made.logits[:, -1].argmax(-1).cpu()
            taken.append(time.perf_counter() - began)
            cache = made.past_key_values
    return taken


def _measured(seconds: Sequence[float], turns: Sequence[Turn]) -> Values:
    """Times of one run. To every live token of a pass the pass is as long as it is."""
    tokens = np.array([len(turn.now.tokens) for turn in turns])
    decode = np.array([turn.now.phase == DECODE for turn in turns])
    taken, counted = np.array(seconds), decode if decode.any() else ~decode
    first = np.repeat(taken[~decode], [len(set(t.now.requests.tolist())) for t in turns if t.now.phase != DECODE])
    return {
        "seconds": float(taken.sum()),
        "tokens_per_s": float(tokens[counted].sum() / taken[counted].sum()),
        "tpot_s": _quantiles(np.repeat(taken[counted], tokens[counted])),
        "ttft_s": _quantiles(first) if len(first) else None,
    }


def _quantiles(each: Any) -> dict[str, float]:
    p50, p90, p99 = np.percentile(each, [50, 90, 99], method="inverted_cdf")
    return {"mean": float(each.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _times(runs: Sequence[Values]) -> Values:
    """Medians over rounds."""
    values: Values = {key: median(run[key] for run in runs) for key in ("seconds", "tokens_per_s")}
    for key in ("tpot_s", "ttft_s"):
        known = runs[0][key]
        values[key] = known and {name: median(run[key][name] for run in runs) for name in known}
    return values


def _summary(
    runs: Sequence[Values], first: Sequence[Values], resident: Sequence[Values], trace: Trace, row: int, rate: float
) -> Values:
    """One policy over all rounds; what is no time is the last round's."""
    last, times, slots = runs[-1], _times(runs), runs[-1]["slots"]
    total = slots["held"] + slots["scratch"]
    least, copies = limit_seconds(trace, total, row, rate, _times(resident)["seconds"] if resident else None)
    parts = {part: median(run["host_us_per_layer"][part] for run in runs) for part in last["host_us_per_layer"]}
    return {
        **last,
        **times,
        "wait_s_per_token": median(run["wait_s_per_token"] for run in runs),
        "overlap": median(run["overlap"] for run in runs),
        "host_us_per_layer": parts,
        "limit": {"seconds": least, "copies": copies, "share": least / times["seconds"]},
        "pace_to_first": _ratio(runs, first),
        "pace_to_resident": _ratio(runs, resident) if resident else None,
    }


def _ratio(runs: Sequence[Values], others: Sequence[Values]) -> dict[str, float]:
    """Tokens per second against another's in the same round."""
    pairs = [own["tokens_per_s"] / other["tokens_per_s"] for own, other in zip(runs, others, strict=True)]
    return {"median": median(pairs), "min": min(pairs), "max": max(pairs)}


def _notes(subject: Subject, trace: Trace, resident: Sequence[Values], runs: dict[str, list[Values]]) -> list[str]:
    notes = ["routing is forced from a recording: the speed is the model's, what it says means nothing"]
    if trace.weights is None:
        notes.append("the trace has no gate weights: every chosen expert got the same")
    if not resident:
        notes.append("everything resident was not measured, so the limit knows the link alone")
    if subject.ram is not None:
        notes.append("experts come from disk, whose rate the limit leaves out")
    if not subject.backend.asynchronous:
        notes.append("slots lie in the host's own memory: copies and computation take turns, so nothing overlaps")
    return notes + [f"{name}: {note}" for name, own in runs.items() for note in own[-1]["said"]]
