"""Random small traces, models, machines and policies, and one way to drive a `Residency` through a trace."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from moeflow.hwprofiles.profile import Hardware, NearMemory, load_hardware
from moeflow.policies.eviction import Eviction
from moeflow.policies.miss_service import MissService
from moeflow.policies.next_gate import NextGate
from moeflow.policies.policy import FOLDER, WAVES, Policy
from moeflow.policies.prefetch import BEFORE_FIRST_LAYER, Prefetch, Proposal
from moeflow.policies.residency import FetchPlan, Residency, Slots
from moeflow.policies.routed import Routed
from moeflow.traces.model_spec import Attention, ModelSpec
from moeflow.traces.trace import DECODE, PREFILL, Request, Trace, TraceMeta, expert_dtype

RTX4090 = replace(load_hardware("rtx4090"), sources={}, documents={})
EVENT, KIND, LAYER, EXPERT, SLOT, VICTIM = range(6)  # columns of a decision log


def policies_in_folder(base: type) -> dict[str, type]:
    """Every subclass of `base` that a file of policies/ defines, by its name in documents: new files are found."""
    stems = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__"})
    modules = [importlib.import_module(f"moeflow.policies.{stem}") for stem in stems]
    return {
        stem.replace("_", "-"): value
        for stem, module in zip(stems, modules, strict=True)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__ != base.__module__
    }


EVICTIONS = policies_in_folder(Eviction)
PREFETCHES = policies_in_folder(Prefetch)
MISS_SERVICES = policies_in_folder(MissService)


def spec(layers: int = 1, experts: int = 4, top_k: int = 1, **others: Any) -> ModelSpec:
    """A model whose every layer has experts."""
    sizes = {"hidden": 64, "intermediate": 32, "attention": Attention("gqa", 2, 1, 8), "vocabulary": 100, **others}
    return ModelSpec("test", layers, tuple(range(layers)), experts, top_k, **sizes)


def trace_of(model: ModelSpec, steps: list[np.ndarray], **others: Any) -> Trace:
    """A trace of one decoding request with the given [T, L, K] ids per step; negative ids are absent."""
    dtype = expert_dtype(model.experts)
    ids = np.concatenate([np.asarray(step) for step in steps])
    rows = len(ids)
    columns = {
        "step": np.repeat(np.arange(len(steps)), [len(step) for step in steps]).astype(np.int32),
        "request": np.zeros(rows, np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "token": np.full(rows, -1, np.int32),
        "phase": np.full(rows, DECODE, np.int8),
        "attempt": np.zeros(rows, np.int16),
        "flags": np.zeros(rows, np.uint8),
        "experts": np.where(ids < 0, np.iinfo(dtype).max, ids).astype(dtype),
    }
    return Trace(meta=TraceMeta(model), **{**columns, **others})


def decode_trace(experts: int, sets: list[list[list[int]]], top_k: int | None = None) -> Trace:
    """One token per step; `sets[step][layer]` lists the experts needed."""
    width = top_k or max(1, max(len(needed) for step in sets for needed in step))
    ids = np.full((len(sets), 1, len(sets[0]), width), -1)
    for step, layers in enumerate(sets):
        for layer, needed in enumerate(layers):
            ids[step, 0, layer, : len(needed)] = needed
    return trace_of(spec(len(sets[0]), experts, width), list(ids))


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """1-4 MoE layers among up to 2 dense ones, 2-8 experts, top-1 to 3, with every kind of attention."""
    moe, dense = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    order = draw(st.permutations([True] * moe + [False] * dense))
    experts = draw(st.integers(2, 8))
    attention = draw(
        st.sampled_from(
            (
                Attention("gqa", 4, 2, 8),
                Attention("mla", 2, 2, 8, rope_head_dim=4, v_head_dim=8, kv_lora_rank=16),
                Attention("mla", 2, 2, 8, rope_head_dim=4, v_head_dim=8, kv_lora_rank=16, q_lora_rank=12),
            )
        )
    )
    return ModelSpec(
        "random",
        moe + dense,
        tuple(layer for layer, is_moe in enumerate(order) if is_moe),
        experts,
        top_k=draw(st.integers(1, min(3, experts))),
        hidden=draw(st.sampled_from((16, 64))),
        intermediate=draw(st.sampled_from((8, 96))),
        attention=attention,
        vocabulary=50,
        matrices=draw(st.sampled_from((2, 3))),
        shared_intermediate=draw(st.sampled_from((0, 32))),
        dense_intermediate=48,
        expert_dtype=draw(st.sampled_from(("", "mxfp4"))),
    )


@st.composite
def traces(draw: st.DrawFn, lookahead: bool | None = None, arrivals: bool = False) -> Trace:
    """Several requests, prompts in chunks and decode rows mixed into steps, absent entries, skewed routing."""
    model = draw(specs())
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = draw(_schedule())
    step, request, position, phase = (np.array(column) for column in zip(*rows, strict=True))
    shape = (len(rows), len(model.moe_layers))
    experts = _choices(rng, model, shape, model.top_k, draw(st.sampled_from((0.3, 3.0))))
    absent = np.iinfo(experts.dtype).max
    if draw(st.booleans()):
        experts[rng.random(shape) < 0.2] = absent
        experts[rng.random(shape) < 0.2, model.top_k - 1 :] = absent
    columns: dict[str, Any] = {
        "weights": -np.sort(-rng.random((*shape, model.top_k))).astype(np.float16),
        "probs": rng.random((*shape, model.experts)).astype(np.float16),
    }
    logits = rng.normal(size=(*shape, model.experts))
    columns["candidates"] = np.argsort(-logits, axis=-1, kind="stable").astype(experts.dtype)
    columns["candidate_logits"] = -np.sort(-logits, axis=-1).astype(np.float16)
    if draw(st.booleans()):
        columns["embedding"] = rng.normal(size=(len(rows), 3)).astype(np.float16)
    distances: tuple[int, ...] = ()
    if draw(st.booleans()) if lookahead is None else lookahead:
        distances = draw(st.sampled_from(((1,), (2,), (1, 2), (1, 3), (1, 2, 3))))
        columns["lookahead"] = _lookahead(rng, model, experts, distances, draw(st.sampled_from((0.0, 0.5, 1.0))))
        columns["lookahead_weights"] = -np.sort(-rng.random(columns["lookahead"].shape)).astype(np.float16)
    known = [Request(r, arrival_s=draw(st.sampled_from((0.0, 1e-4, 0.01)))) for r in set(request.tolist())]
    return Trace(
        meta=TraceMeta(model, tuple(known) if arrivals else (), lookahead_distances=distances),
        step=(step + draw(st.sampled_from((0, 7)))).astype(np.int32),
        request=request.astype(np.int32),
        position=position.astype(np.int32),
        token=rng.integers(0, 50, len(rows)).astype(np.int32),
        phase=phase.astype(np.int8),
        attempt=np.zeros(len(rows), np.int16),
        flags=np.zeros(len(rows), np.uint8),
        experts=experts,
        **columns,
    )


@st.composite
def _schedule(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(step, request, position, phase) rows."""
    prompt = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    total = [length + draw(st.integers(1, 6)) for length in prompt]
    at, rows = [0] * len(prompt), []
    for step in count():
        unfinished = [r for r in range(len(prompt)) if at[r] < total[r]]
        if not unfinished or step == 12:
            return rows
        for r in draw(st.lists(st.sampled_from(unfinished), min_size=1, max_size=3, unique=True)):
            prefill = at[r] < prompt[r]
            n = draw(st.integers(1, prompt[r] - at[r])) if prefill else 1
            rows += [(step, r, at[r] + i, PREFILL if prefill else DECODE) for i in range(n)]
            at[r] += n
    raise AssertionError


def _choices(rng: np.random.Generator, model: ModelSpec, shape: tuple[int, ...], width: int, skew: float) -> np.ndarray:
    """Distinct ids along a new last axis, some experts likelier than others in each layer."""
    taste = skew * rng.gumbel(size=(shape[-1], model.experts))
    scores = taste + rng.gumbel(size=(*shape, model.experts))
    return np.argsort(-scores, axis=-1)[..., :width].astype(expert_dtype(model.experts))


def _lookahead(
    rng: np.random.Generator, model: ModelSpec, experts: np.ndarray, distances: tuple[int, ...], truth: float
) -> np.ndarray:
    """[N, L+1, D, K']: a share `truth` of the predictions comes true; nothing lies past the last layer."""
    rows, layers, k = experts.shape
    width = min(model.experts, k + 1)
    ahead = _choices(rng, model, (rows, (layers + 1) * len(distances)), width, 0.3)
    ahead = ahead.reshape(rows, layers + 1, len(distances), width)
    for source in range(layers + 1):
        for column, distance in enumerate(distances):
            target = source - 1 + distance
            if target >= layers:
                ahead[:, source, column] = np.iinfo(experts.dtype).max
                continue
            right = np.flatnonzero(rng.random(rows) < truth)
            ahead[right, source, column, :k] = experts[right, target]
            ahead[right, source, column, k:] = np.iinfo(experts.dtype).max
    return ahead


@st.composite
def machines(draw: st.DrawFn, near: bool | None = None) -> Hardware:
    """A 4090 with slow and fast parts, free calls, graph dispatch, unified memory and, if `near`, a near-memory unit.

    None: sometimes.
    """
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    base = RTX4090
    device = replace(
        base.device,
        unified_memory=pick(False, False, False, True),
        memory_bandwidth=pick(1e9, 1e12),
        flops=pick(1e10, 1e14),
        op_latency_s=pick(0.0, 3e-6),
    )
    host = replace(
        base.host,
        issue_s=pick(0.0, 1e-6, 1e-5),
        graph_issue_s=pick(0.0, 1e-5),
        launch_latency_s=pick(0.0, 4.4e-6, 2e-5),
        sync_s=pick(0.0, 1.9e-5),
        sample_s=pick(0.0, 3e-4),
        policy_s=pick(0.0, 1e-5),
    )
    h2d = replace(base.link.h2d, alpha_s=pick(0.0, 1e-5), bandwidth=pick(1e6, 1e8, 1e9, 25e9))
    h2d = replace(h2d, pageable_bandwidth=pick(0.3, 1.0) * h2d.bandwidth)
    link = replace(base.link, h2d=h2d, submit_s=pick(0.0, 5.5e-6, 1e-4), submit_batched_s=pick(0.0, 2.6e-6))
    storage = replace(base.storage, read_bandwidth=pick(1e8, 7e9), latency_s=pick(1e-6, 7e-5), block_bytes=4096)
    unit = NearMemory(
        "unit", False, internal_bandwidth=pick(1e7, 1e9, 1e12), flops=pick(1e7, 1e9, 1e13),
        capacity_bytes=pick(0, 40_000, 10**9), alpha_s=pick(0.0, 1e-5), write_bandwidth=pick(1e6, 1e12),
        read_bandwidth=pick(1e6, 1e9, 1e12),
    )  # fmt: skip
    return replace(
        base, dispatch=pick("eager", "graph"), device=device, host=host, link=link, storage=storage,
        near_memory=unit if near or (near is None and pick(False, False, True)) else None,
    )  # fmt: skip


@st.composite
def documents(
    draw: st.DrawFn, trace: Trace, evict: str | None = None, prefetch: str | None = None, miss: str | None = None
) -> dict[str, Any]:
    """A policy document that `trace` can feed; `prefetch` names one kind, or none."""
    name = evict or draw(st.sampled_from(_served(EVICTIONS, trace)))
    scope = draw(st.sampled_from(("layer", "global")))
    part: dict[str, Any] = {"kind": prefetch or draw(st.sampled_from(("none", *_served(PREFETCHES, trace))))}
    if part["kind"] != "none":
        part |= draw(_parameters(PREFETCHES[part["kind"]]))
        if "lookahead" in PREFETCHES[part["kind"]].needs:
            part["distance"] = draw(st.sampled_from(trace.meta.lookahead_distances))
    miss = {
        **draw(_miss_services(trace, miss)),
        "waves": draw(st.sampled_from(WAVES)),
        "scratch": draw(st.integers(1, 3)),
        "chunks": draw(st.integers(1, 4)),
    }
    reads = (*EVICTIONS[name].needs, *(PREFETCHES[part["kind"]].needs if part["kind"] != "none" else ()))
    return {
        "cache": {"evict": name, "scope": scope, **draw(_parameters(EVICTIONS[name]))},
        "prefetch": part | draw(_guards()),
        "predict": {"kind": "next-gate" if "predicted" in reads else "none"},
        "miss": miss,
    }


@st.composite
def _miss_services(draw: st.DrawFn, trace: Trace, kind: str | None) -> dict[str, Any]:
    """`wait` half of the time."""
    kind = kind or draw(st.sampled_from(("wait", *_served(MISS_SERVICES, trace))))
    return {"kind": kind, **draw(_parameters(MISS_SERVICES[kind]))}


@st.composite
def _guards(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly none."""
    some = draw(st.sampled_from((False, False, True)))
    values = {"dwell": (1, 3), "per_layer": (1, 2), "in_flight": (1, 2, 5)}
    return {name: draw(st.sampled_from(each)) for name, each in values.items() if some and draw(st.booleans())}


def _served(classes: dict[str, type], trace: Trace) -> list[str]:
    """Names of the policies for which the trace has every column."""
    has = {"future", *trace.columns} | ({"predicted"} if trace.lookahead is not None else set())
    return [name for name, cls in classes.items() if has.issuperset(cls.needs)]


@st.composite
def _parameters(draw: st.DrawFn, cls: type) -> dict[str, Any]:
    """Small values of every whole-number parameter and both of every flag; others keep their defaults."""
    chosen: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if isinstance(parameter.default, bool):
            chosen[name] = draw(st.booleans())
        elif isinstance(parameter.default, int):
            chosen[name] = draw(st.sampled_from((1, 2, 3, parameter.default)))
    return chosen


@st.composite
def slots_for(draw: st.DrawFn, trace: Trace, policy: Policy) -> Slots:
    """Any capacity from one slot per scope to everything, shared out unequally."""
    model = trace.meta.model
    layers = len(model.moe_layers)
    if policy.scope == "global":
        return Slots((draw(st.integers(1, layers * model.experts)),), policy.scratch)
    each = st.integers(1, model.experts)
    return Slots(tuple(draw(each) for _ in range(layers)), policy.scratch)


@dataclass(frozen=True)
class Case:
    """One run without time."""

    trace: Trace
    policy: Policy
    slots: Slots

    def residency(self) -> Residency:
        return self.policy.residency(self.trace, self.slots, keep_log=True)


@st.composite
def cases(
    draw: st.DrawFn, evict: str | None = None, prefetch: str | None = None, miss: str | None = "wait", **of_trace: Any
) -> Case:
    classes = [cls for cls in (EVICTIONS.get(evict or ""), PREFETCHES.get(prefetch or "")) if cls is not None]
    reads = {name for cls in classes for name in cls.needs}
    trace = draw(traces(lookahead=True if reads & {"lookahead", "predicted"} else None, **of_trace))
    policy = Policy.from_document(draw(documents(trace, evict, prefetch, miss)))
    return Case(trace, policy, draw(slots_for(trace, policy)))


@dataclass(frozen=True)
class Moment:
    """Right after a fetch plan; `routed` is None before the first layer."""

    step: int
    layer: int
    routed: Routed | None
    plan: FetchPlan


def drive(residency: Residency, trace: Trace, form: Any = lambda ids: ids) -> Iterator[Moment]:
    """The events of DESIGN section 3, in order, with every column; `form` converts the ids on their way in.

    Predictions are the next gates'.
    """
    starts, ahead, layers = trace.step_starts, trace.lookahead, range(residency.layers)
    chances = trace.lookahead_weights
    said = NextGate().predict(trace) if ahead is not None else None
    seen: set[int] = set()
    for step, (first, last) in enumerate(pairwise(starts)):
        rows = slice(first, last)
        requests = trace.request[rows]
        for request in sorted(set(requests.tolist()) - seen):
            residency.request_begins(request)
            seen.add(request)
        phase = DECODE if (trace.phase[rows] == DECODE).all() else PREFILL
        residency.step_begins(
            step, trace.token[rows], requests, phase,
            None if ahead is None else ahead[rows, 0], None if chances is None else chances[rows, 0],
            None if said is None else said.at(BEFORE_FIRST_LAYER, rows),
            {} if trace.embedding is None else {"embedding": trace.embedding[rows]},
        )  # fmt: skip
        yield Moment(step, BEFORE_FIRST_LAYER, None, residency.fetch_plan(BEFORE_FIRST_LAYER))
        for layer in layers:
            columns = {name: getattr(trace, name) for name in ("probs", "candidates", "candidate_logits")}
            columns = {name: array[rows, layer] for name, array in columns.items() if array is not None}
            weights = None if trace.weights is None else trace.weights[rows, layer]
            at_layer = None if ahead is None else ahead[rows, layer + 1]
            ids = form(trace.experts[rows, layer])
            at_layer_chances = None if chances is None else chances[rows, layer + 1]
            at_layer_said = None if said is None else said.at(layer, rows)
            routed = residency.routed(layer, ids, weights, requests, at_layer, columns, at_layer_chances, at_layer_said)
            yield Moment(step, layer, routed, residency.fetch_plan(layer))
            residency.layer_done(layer)
        for request in sorted(set(requests.tolist()) - set(trace.request[last:].tolist())):
            residency.request_ends(request)


def log_of(residency: Residency, trace: Trace, form: Any = lambda ids: ids) -> np.ndarray:
    """[n, 6] decisions of a whole trace."""
    for _ in drive(residency, trace, form):
        pass
    return residency.decision_log()


def note_proposals(residency: Residency) -> list[Proposal]:
    """Everything the prefetch policy proposes from now on, as it does so."""
    noted: list[Proposal] = []

    def noting(propose: Any) -> Any:
        def noted_too(event: Any) -> list[Proposal]:
            proposals = propose(event)
            noted.extend(proposals)
            return proposals

        return noted_too

    if residency.prefetch is not None:
        for name in ("propose_first", "propose"):
            setattr(residency.prefetch, name, noting(getattr(residency.prefetch, name)))
    return noted
