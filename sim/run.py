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
from .arrivals import describe, with_arrivals
from .batches import Steps
from .budget import parse_bytes, slots_for_budget, slots_for_memory
from .compiled import CompiledEngine
from .engines import engine_for, with_timeline
from .events import Setup
from .placement import Placement, device_notes, on_device, one_device, part, place, refuse_alone
from .result import RESULT_FORMAT, Result, all_slots, make_result, most_cached
from .serving import budget_of_a_step, refuse_what_never_fits
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
    devices: int = 1,
    parallel: str | None = None,
    batching: str = "recorded",
    token_budget: int | None = None,
    arrivals: str | Path | None = None,
    seed: int | None = None,
    engine: str = "auto",
    timeline_steps: int = 0,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
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
    devices, parallel: so many of the machine's devices, each with its own link; "layer" (the default) cuts the layers
    into runs, "expert" deals the experts of every layer. A fraction is one of each device's experts; bytes, slots and
    vram are each device's.
    batching: `recorded` steps, or `continuous`: steps of at most `token_budget` tokens (default 2048) that requests
    form as they arrive. arrivals: "trace", "poisson:RATE" (requests per second, drawn from `seed`, default 0) or a
    JSONL file; None takes the trace's as far as it has any, else requests wait for nothing.
    engine: "events" (SimPy), "compiled" (the same results many times faster, but not for everything) or "auto":
    compiled where it can be, else events with a note that says why.
    timeline_steps: how many steps `Result.measurements.spans` covers.
    progress: called with (tokens done, tokens). notice: called with a sentence, from another thread, when the compiled
    engine has to be compiled first. Raises InputError for anything that cannot be.
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
    step_tokens = budget_of_a_step(batching, token_budget, batch, resolved)
    if batch is not None:
        loaded = lockstep(loaded, batch)
    label, predictions = _trace_label(loaded, name), resolved.predictions(loaded)
    schedule = resolved.schedule()
    regrouped = None if schedule is None else schedule.regroup(loaded, predictions)
    if regrouped is not None:
        loaded, predictions = regrouped.trace(loaded), regrouped.predictions(predictions)
    placement = place(priced, devices, parallel)
    refuse_alone(resolved, hardware, devices, batching)
    if arrivals is not None or seed is not None or step_tokens is not None:
        loaded = with_arrivals(loaded, arrivals, seed)
    slots, given = _slots(loaded, priced, hardware, resolved, placement, budget, vram, max_context)
    if devices == 1:
        slots = [resolved.shared_out(slots[0], loaded)]
    in_pinned, in_ram = host_tiers(ram, pinned, host_memory, priced, hardware)
    in_sample = resolved.in_sample(loaded)
    unit = hardware.near_memory
    if unit is None and resolved.miss_service().near_memory:
        raise InputError(f"policy {resolved.name}: {hardware.name} has no near-memory unit; add --near-memory NAME")
    calibrated = hardware.calibrated and (in_ram is None or hardware.storage.calibrated)
    calibrated = calibrated and (unit is None or unit.calibrated)

    def make_setup() -> Setup:
        residencies = [resolved.residency(loaded, each, here=placement.here(i)) for i, each in enumerate(slots)]
        return Setup(
            loaded,
            priced,
            hardware,
            residencies[0],
            waves=resolved.document["miss"]["waves"],
            chunks=resolved.document["miss"]["chunks"],
            experts_pinned=in_pinned,
            experts_in_ram=in_ram,
            timeline_steps=timeline_steps,
            regrouped=regrouped,
            placement=placement,
            others=tuple(residencies[1:]),
            token_budget=step_tokens,
            **_predictor(resolved, predictions, hardware),
        )

    setup = make_setup()
    chosen, engine_name, engine_notes = engine_for(engine, setup)
    if progress:
        chosen.progress = lambda done: progress(done, loaded.rows)
    if notice and isinstance(chosen, CompiledEngine):
        chosen.notice = notice
    if step_tokens is not None:
        refuse_what_never_fits(setup)
    else:
        _refuse_overfull(setup, chosen.steps, given)
    measured = chosen.run()
    with_timeline(chosen, make_setup)
    together = all_slots(setup.residencies)
    labels = {
        "format": RESULT_FORMAT,
        "engine": engine_name,
        "calibrated": calibrated,
        "exactness": _exactness(resolved, regrouped is not None or step_tokens is not None),
        "trace": label,
        "model": {"name": priced.name, "bytes_per_expert": priced.bytes_per_expert, "dense_bytes": priced.dense_bytes},
        "hardware": {
            "name": hardware.name, "link": hardware.link.name, "storage": hardware.storage.name,
            "near_memory": None if unit is None else unit.name,
            "dispatch": hardware.dispatch, "host_memory": host_memory,
            **({"devices": devices, "parallel": parallel or "layer"} if devices > 1 else {}),
        },
        "policy": {
            "name": resolved.name, "document": resolved.document,
            "timing_free": resolved.timing_free, "oracle": resolved.oracle or in_sample > 0, "in_sample": in_sample,
        },
        "batching": {"kind": batching, "token_budget": step_tokens, **describe(arrivals, seed)},
        "budget": given,
        "budget_bytes": together.total * priced.bytes_per_expert,
        "slots": {"held": together.held, "scratch": together.scratch, "per_scope": list(together.per_scope)},
        "notes": _notes(setup, resolved, calibrated, in_sample)
        + _batch_notes(batch, regrouped, step_tokens)
        + device_notes(placement, priced, hardware, given) + engine_notes,
    }  # fmt: skip
    return make_result(chosen.setup, chosen.steps, chosen.cost, measured, labels)


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
    trace: Trace, model: ModelSpec, hardware: Hardware, policy: Policy, placement: Placement,
    budget: Any, vram: Any, max_context: int | None,
) -> tuple[list[Slots], str]:  # fmt: skip
    """Each device's slots, and what was asked for in words."""
    if budget is not None and vram is not None:
        raise InputError("--budget and --vram say the same thing twice: give one of them")
    if budget == "auto":
        budget, vram = None, "auto"
    if vram is None and max_context is not None:
        raise InputError("--max-context reserves KV cache inside --vram: give --vram too, or leave it out")
    memory = 0 if vram is None else hardware.device.memory_bytes if vram == "auto" else parse_bytes(str(vram), "--vram")
    context = max_context if max_context is not None else int(trace.position.max(initial=0)) + 1
    given = "0.25" if budget is None else str(budget)
    slots = []
    for device in range(placement.devices):
        its = part(placement, device, model)
        if vram is None:
            found = slots_for_budget(given, its, policy.scope, policy.scratch)
        else:
            held = placement.dense_bytes(device, model), placement.kv_bytes_per_token(device, model)
            found = slots_for_memory(memory, its, hardware, policy.scope, policy.scratch, context, held)
        slots.append(on_device(placement, device, found, policy.scope))
    if vram is not None:
        given = f"what {memory / 2**30:.2f} GiB leaves beside dense weights, workspace and {context} tokens of KV"
    return slots, given


def _refuse_overfull(setup: Setup, steps: Steps, given: str) -> None:
    """The number of slots that fit is exact: what does not fit is refused, never assumed."""
    model, device = setup.model, setup.hardware.device
    placement, keys = setup.placement or one_device(model), most_cached(steps)
    for i, residency in enumerate(setup.residencies):
        cached = keys * placement.kv_bytes_per_token(i, model)
        slots, dense = residency.slots.total * model.bytes_per_expert, placement.dense_bytes(i, model)
        need = device.reserve_bytes + dense + slots + cached
        if need > device.memory_bytes:
            which = f" (device {i})" if setup.others else ""
            raise InputError(
                f"--budget {given}: {need / 2**30:.2f} GiB do not fit the {device.memory_bytes / 2**30:.2f} GiB of "
                f"{setup.hardware.name}{which} (expert slots {slots / 2**30:.2f}, dense weights {dense / 2**30:.2f}, "
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


def _batch_notes(batch: int | None, regrouped: Regrouped | None, step_tokens: int | None) -> list[str]:
    notes = []
    if step_tokens is not None:
        notes.append(
            f"continuous batching, at most {step_tokens} tokens a step: each token's routing is taken to stay as "
            "recorded; no bounds for batches other than the trace's"
        )
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
        where = "in near memory" if policy.miss_service().near_memory else "on the host's cores"
        notes.append(f"numeric: experts {where} round differently; sums agree to rounding, not to the bit")
    if exactness == "lossy":
        notes.append(
            "lossy and counterfactual: other experts or bits than the model asked for, on routing recorded without "
            "them; only a live run can say what it costs in quality, and no bound is given"
        )
    if policy.document["miss"]["prefill"] != "select":
        streamed = setup.residency.streamed_steps
        notes.append(f"miss.prefill {policy.document['miss']['prefill']}: {streamed} steps streamed whole layers")
    if policy.oracle:
        notes.append("oracle: the policy knows the trace's future; no live system can do this")
    if in_sample:
        notes.append(f"oracle: fitted on {in_sample:.0%} of these requests; quote a run on others")
    if setup.experts_pinned:
        notes.append(f"{setup.experts_pinned} experts of those in host memory are pinned, the others pageable")
    if setup.experts_in_ram is not None:
        total, near = len(model.moe_layers) * model.experts, near_experts(model, hardware)
        notes.append(f"{total - near - setup.experts_in_ram} of {total} experts rest on {hardware.storage.name}")
    return notes
