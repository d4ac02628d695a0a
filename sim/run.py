"""`simulate`: one trace, one machine, one policy, one budget, one result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hwprofiles.profile import Hardware, load_hardware
from ..policies.policy import Policy
from ..policies.predictor import Predictions
from ..policies.residency import Slots
from ..policies.schedule import Regrouped
from ..traces.bundled import BUNDLED_TRACE, PRICED_AS
from ..traces.lockstep import lockstep
from ..traces.model_spec import ModelSpec
from ..traces.models import load_model_spec
from ..traces.reader import load_trace
from ..traces.trace import Trace
from .budget import parse_bytes, slots_for_budget, slots_for_memory
from .events import EventsEngine, Setup
from .result import RESULT_FORMAT, Result, make_result
from .tiers import host_tiers, near_experts


def simulate(
    trace: Trace | str | Path | None = None,
    hw: Hardware | str = "rtx4090",
    policy: Policy | str | dict[str, Any] = "moeflow",
    budget: str | float | int | None = None,
    *,
    vram: str | None = None,
    max_context: int | None = None,
    ram: str | None = None,
    host_memory: str = "pinned",
    pinned: str | None = None,
    model: ModelSpec | str | None = None,
    link: str | None = None,
    storage: str | None = None,
    near_memory: str | None = None,
    fitted: str | Path | None = None,
    batch: int | None = None,
    timeline_steps: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Replay `trace` on modelled hardware under `policy`; what `sim run` does.

    trace: a `Trace`, a file, or None for the bundled recording (priced as OLMoE-1B-7B unless `model` says otherwise).
    hw, link, storage, near_memory: a profile's name or file. policy: a document, its file or a preset's name.
    budget: expert slots plus scratch as bytes ("20GiB"), slots (512) or a fraction (0.25, the default); or
    vram: the whole device ("24GiB", or "auto" for all it has), less dense weights, workspace and KV for
    `max_context` tokens (default: the longest in the trace). ram: host memory for experts; the rest goes to SSD.
    host_memory: pinned or pageable; pinned: how much of it is pinned ("16GiB"; the other experts in it are pageable).
    fitted: the file of a policy's trained predictor.
    batch: requests that advance in lockstep, instead of the recorded batches.
    timeline_steps: how many steps `Result.measurements.spans` covers.
    progress: called with (steps done, steps). Raises InputError for anything that cannot be.
    """
    name = str(trace) if isinstance(trace, (str, Path)) else "bundled" if trace is None else "in memory"
    if trace is None:
        trace, model = load_trace(BUNDLED_TRACE), model or PRICED_AS
    loaded = trace if isinstance(trace, Trace) else load_trace(trace)
    hardware = hw if isinstance(hw, Hardware) else load_hardware(hw, link, storage, near_memory)
    resolved = load_policy(policy) if fitted is None else load_policy(policy).with_fitted(str(fitted))
    priced = price(loaded, model, name)
    if not loaded.rows:
        raise InputError(f"trace {name}: it has no rows, so there is nothing to replay")
    if batch is not None:
        loaded = lockstep(loaded, batch)
    label, predictions = _trace_label(loaded, name), resolved.predictions(loaded)
    schedule = resolved.schedule()
    regrouped = None if schedule is None else schedule.regroup(loaded, predictions)
    if regrouped is not None:
        loaded, predictions = regrouped.trace(loaded), regrouped.predictions(predictions)
    slots, given = _slots(loaded, priced, hardware, resolved, budget, vram, max_context)
    slots = resolved.shared_out(slots, loaded)
    in_pinned, in_ram = host_tiers(ram, pinned, host_memory, priced, hardware)
    in_sample = resolved.in_sample(loaded)
    unit = hardware.near_memory
    if unit is None and resolved.miss_service().near_memory:
        raise InputError(f"policy {resolved.name}: {hardware.name} has no near-memory unit; add --near-memory NAME")
    calibrated = hardware.calibrated and (in_ram is None or hardware.storage.calibrated)
    calibrated = calibrated and (unit is None or unit.calibrated)
    setup = Setup(
        loaded,
        priced,
        hardware,
        resolved.residency(loaded, slots),
        waves=resolved.document["miss"]["waves"],
        chunks=resolved.document["miss"]["chunks"],
        experts_pinned=in_pinned,
        experts_in_ram=in_ram,
        timeline_steps=timeline_steps,
        regrouped=regrouped,
        **_predictor(resolved, predictions, hardware),
    )
    engine = EventsEngine(setup)
    if progress:
        steps = len(engine.steps)
        engine.progress = lambda done: progress(done, steps)
    _refuse_overfull(setup, engine, given)
    measured = engine.run()
    labels = {
        "format": RESULT_FORMAT,
        "engine": "events",
        "calibrated": calibrated,
        "exactness": _exactness(resolved, regrouped is not None),
        "trace": label,
        "model": {"name": priced.name, "bytes_per_expert": priced.bytes_per_expert, "dense_bytes": priced.dense_bytes},
        "hardware": {
            "name": hardware.name, "link": hardware.link.name, "storage": hardware.storage.name,
            "near_memory": None if unit is None else unit.name, "dispatch": hardware.dispatch,
            "host_memory": host_memory,
        },
        "policy": {
            "name": resolved.name, "document": resolved.document,
            "timing_free": resolved.timing_free, "oracle": resolved.oracle or in_sample > 0, "in_sample": in_sample,
        },
        "budget": given,
        "budget_bytes": slots.total * priced.bytes_per_expert,
        "slots": {"held": slots.held, "scratch": slots.scratch, "per_scope": list(slots.per_scope)},
        "notes": _notes(setup, resolved, calibrated, in_sample) + _batch_notes(batch, regrouped),
    }  # fmt: skip
    return make_result(setup, engine.steps, engine.cost, measured, labels)


def load_policy(policy: Policy | str | dict[str, Any]) -> Policy:
    """A checked policy from whatever `simulate` accepts."""
    if isinstance(policy, Policy):
        return policy
    return Policy.from_document(policy) if isinstance(policy, dict) else Policy.load(policy)


def price(trace: Trace, model: ModelSpec | str | None, name: str) -> ModelSpec:
    """The sizes that price the run. Raises InputError when another model's geometry is not the trace's."""
    own = trace.meta.model
    if model is None:
        return own
    spec = model if isinstance(model, ModelSpec) else load_model_spec(model)
    shape = (len(spec.moe_layers), spec.experts, spec.top_k)
    recorded = (len(own.moe_layers), own.experts, own.top_k)
    if shape != recorded:
        raise InputError(
            "--model {}: its {} MoE layers x {} experts, top-{} do not fit trace {} with {} x {}, top-{}: "
            "price it with a model of the trace's geometry".format(spec.name, *shape, name, *recorded)
        )
    return spec


def _slots(
    trace: Trace, model: ModelSpec, hardware: Hardware, policy: Policy, budget: Any, vram: Any, max_context: int | None
) -> tuple[Slots, str]:
    if budget is not None and vram is not None:
        raise InputError("--budget and --vram say the same thing twice: give one of them")
    if budget == "auto":
        budget, vram = None, "auto"
    if vram is None:
        if max_context is not None:
            raise InputError("--max-context reserves KV cache inside --vram: give --vram too, or leave it out")
        given = "0.25" if budget is None else str(budget)
        return slots_for_budget(given, model, policy.scope, policy.scratch), given
    memory = hardware.device.memory_bytes if vram == "auto" else parse_bytes(str(vram), "--vram")
    context = max_context if max_context is not None else int(trace.position.max(initial=0)) + 1
    slots = slots_for_memory(memory, model, hardware, policy.scope, policy.scratch, context)
    return slots, f"what {memory / 2**30:.2f} GiB leaves beside dense weights, workspace and {context} tokens of KV"


def _refuse_overfull(setup: Setup, engine: EventsEngine, given: str) -> None:
    """The number of slots that fit is exact: what does not fit is refused, never assumed."""
    model, device = setup.model, setup.hardware.device
    cached = max((batch.cached for batch in engine.steps.batches), default=0) * model.kv_bytes_per_token
    slots = setup.residency.slots.total * model.bytes_per_expert
    need = device.reserve_bytes + model.dense_bytes + slots + cached
    if need > device.memory_bytes:
        raise InputError(
            f"--budget {given}: {need / 2**30:.2f} GiB do not fit the {device.memory_bytes / 2**30:.2f} GiB of "
            f"{setup.hardware.name} (expert slots {slots / 2**30:.2f}, dense weights {model.dense_bytes / 2**30:.2f}, "
            f"KV cache {cached / 2**30:.2f}, workspace {device.reserve_bytes / 2**30:.2f}): "
            "lower the budget, or use --vram auto"
        )


def _trace_label(trace: Trace, name: str) -> dict[str, Any]:
    model = trace.meta.model
    return {
        "name": Path(name).name,
        "recorded_model": model.name,
        "rows": trace.rows,
        "steps": len(trace.step_starts) - 1,
        "sha256": trace.content_sha256,
    }


def _exactness(policy: Policy, regrouped: bool) -> str:
    """Another batch is another shape of kernel, so regrouping keeps no bits."""
    exactness = str(policy.miss_service().exactness)
    return "numeric" if regrouped and exactness == "bit" else exactness


def _batch_notes(batch: int | None, regrouped: Regrouped | None) -> list[str]:
    notes = []
    if batch is not None:
        notes.append(f"batches of {batch} requests in lockstep; each token's routing is taken to stay as recorded")
    if regrouped is not None:
        notes.append("no bounds: the schedule formed other batches than the trace's")
    return notes


def _predictor(policy: Policy, predictions: Predictions | None, hardware: Hardware) -> dict[str, Any]:
    """The fields of `Setup` that a predictor fills: its predictions, and what each costs."""
    predictor = policy.predictor()
    if predictor is None:
        return {}
    seconds = predictor.seconds_per_call()
    return {
        "predictions": predictions,
        "predictor_gates": predictor.gates,
        "predictor_s": hardware.host.predictor_s if seconds is None else seconds,
    }


def _notes(setup: Setup, policy: Policy, calibrated: bool, in_sample: float) -> list[str]:
    """What a reader must know before quoting a figure."""
    notes, model, hardware = [], setup.model, setup.hardware
    if not calibrated:
        notes.append(f"uncalibrated: {hardware.name} has numbers that nobody measured on such a machine")
    if model.name != setup.trace.meta.model.name:
        notes.append(f"routing recorded from {setup.trace.meta.model.name}, priced with the sizes of {model.name}")
    exactness = policy.miss_service().exactness
    if exactness == "numeric":
        notes.append("numeric: experts computed beside the device round differently: sums agree to rounding, not bits")
    if exactness == "lossy":
        notes.append(
            "lossy and counterfactual: other experts or bits than the model asked for, on routing recorded without "
            "them; only a live run can say what it costs in quality, and no bound is given"
        )
    if policy.oracle:
        notes.append("oracle: the policy knows the trace's future; no live system can do this")
    if in_sample:
        notes.append(f"oracle: fitted on {in_sample:.0%} of these requests; quote a run on others")
    if setup.experts_pinned is not None:
        notes.append(f"{setup.experts_pinned} experts of those in host memory are pinned, the others pageable")
    if setup.experts_in_ram is not None:
        total, near = len(model.moe_layers) * model.experts, near_experts(model, hardware)
        notes.append(f"{total - near - setup.experts_in_ram} of {total} experts rest on {hardware.storage.name}")
    return notes
