"""`tune`: search for a policy and a budget on half of a trace's requests, judge what was found on the other half."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..hwprofiles.profile import Hardware
from ..policies import layer_budget
from ..policies.policy import Policy
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace
from .budget import parse_bytes, slots_for_budget, slots_for_memory
from .compare import compare
from .pareto import pareto_front
from .result import RESULT_FORMAT, Result
from .run import simulate
from .search_space import Space
from .study import complete, ended, open_study, search

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

DEFAULT = "moeflow"  # the untuned policy that a tuned one is held against
MOST_SCRATCH = 4  # that a search draws
OBJECTIVES: dict[str, Callable[[Any], float]] = {
    "time": lambda result: float(result["tpot_s"]["mean"]),
    "memory": lambda result: float(result["budget_bytes"]),
    "link": lambda result: sum(
        float(result["bytes_per_token"][kind]) for kind in ("demand", "stream", "prefetch", "low_bit")
    ),
}

Values = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is tuned: a trace in two halves, on one machine, within slots per layer."""

    trace: Trace
    tuned_on: Trace
    judged_on: Trace
    hardware: Hardware
    model: ModelSpec
    objectives: tuple[str, ...]
    allowed: tuple[str, ...]
    slots: tuple[int, int]
    seed: int

    @property
    def name(self) -> str:
        """The same for the same search, so that another process, or another day, goes on with it."""
        machine = asdict(replace(self.hardware, sources={}, documents={}))
        facts = [RESULT_FORMAT, version("moeflow"), self.tuned_on.content_sha256, machine, self.model.to_dict()]
        facts += [self.objectives, self.allowed, self.slots, self.seed]
        return "moeflow-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def simulate(self, trace: Trace, policy: Policy | str, budget: str) -> Result:
        """One run on this problem's machine."""
        return simulate(trace, self.hardware, policy, budget, model=self.model)


def halves(trace: Trace, seed: int) -> tuple[Trace, Trace]:
    """The trace's requests in two random halves (the first is larger by one of an odd number). Raises InputError."""
    requests = np.unique(trace.request)
    if len(requests) < 2:
        raise InputError("sim tune: the trace has a single request, so none is left to judge on; record at least two")
    shuffled = np.random.default_rng(seed).permutation(requests)
    middle = (len(requests) + 1) // 2
    return trace.of_requests(shuffled[:middle].tolist()), trace.of_requests(shuffled[middle:].tolist())


def slots_within(
    trace: Trace, model: ModelSpec, hardware: Hardware, vram: str | None, budget_range: str | None
) -> tuple[int, int]:
    """Fewest and most slots per layer: `--budget-range LOW,HIGH`, or up to what `--vram` leaves. Raises InputError."""
    if budget_range is None:
        memory = hardware.device.memory_bytes if vram in (None, "auto") else parse_bytes(str(vram), "--vram")
        context = int(trace.position.max(initial=0)) + 1
        return 1, min(slots_for_memory(memory, model, hardware, "layer", MOST_SCRATCH, context).per_scope)
    if vram is not None:
        raise InputError("--budget-range and --vram both limit the budget: give one of them")
    ends = [part.strip() for part in budget_range.split(",")]
    if len(ends) != 2:
        raise InputError(f"--budget-range {budget_range!r}: expected the least and the most, such as 0.1,0.5")
    low, high = (min(slots_for_budget(end, model, "layer", MOST_SCRATCH).per_scope) for end in ends)
    if low > high:
        raise InputError(f"--budget-range {budget_range!r}: the least is more than the most; swap them")
    return low, high


def tune(
    problem: Problem,
    out: Path,
    storage: str,
    sampler: str,
    trials: int,
    timeout_s: float | None = None,
    pick: str = "time",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Values, Policy]:
    """Search, pick from the front, judge. Returns what `tune.json` holds and the picked policy.

    `out`: a folder, where the statistics behind `cache.split` are kept. `pick`: an objective's name, whose least is
    taken, or the number of a trial on the front. Raises InputError.
    """
    study = open_study(problem.name, storage, len(problem.objectives), sampler, problem.seed)
    unit = problem.hardware.near_memory is not None
    space = Space(problem.tuned_on, problem.allowed, problem.slots, _split_file(problem, out), unit)

    def evaluate(trial: Trial) -> tuple[list[float], Values]:
        policy = Policy.from_document(space.document(trial), "tuned", f"trial {trial.number}")
        budget = space.budget(trial, policy.scratch)
        result = problem.simulate(problem.tuned_on, policy, budget)
        figures = {name: objective(result) for name, objective in OBJECTIVES.items()}
        kept = {"document": policy.document, "budget": budget, "figures": figures, "exactness": result["exactness"]}
        return [figures[name] for name in problem.objectives], kept

    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(space.drawn(Policy.load(DEFAULT), problem.slots[1]), skip_if_exists=True)
    search(study, evaluate, trials, timeout_s, progress)
    known = complete(study)
    if not known:
        reasons = [trial.user_attrs["error"] for trial in ended(study) if "error" in trial.user_attrs]
        raise InputError(f"sim tune: no trial could run ({reasons[-1] if reasons else 'the time was up'})")
    front = [known[i] for i in pareto_front([trial.values for trial in known])]
    best = _picked(front, pick)
    policy = Policy.from_document(best.user_attrs["document"], "policy")
    found = {
        "format": RESULT_FORMAT,
        "trace": {"sha256": problem.trace.content_sha256, "requests": len(np.unique(problem.trace.request))},
        "model": problem.model.name,
        "hardware": {"name": problem.hardware.name, "link": problem.hardware.link.name},
        "calibrated": problem.hardware.calibrated,
        "objectives": list(problem.objectives),
        "allowed": list(problem.allowed),
        "slots_per_layer": list(problem.slots),
        "search": {
            "sampler": sampler, "seed": problem.seed, "study": problem.name, "trials": len(known),
            "impossible": len(ended(study)) - len(known),
        },
        "tuned_on": np.unique(problem.tuned_on.request).tolist(),
        "judged_on": np.unique(problem.judged_on.request).tolist(),
        "front": [_described(trial) for trial in front],
        "picked": _described(best),
    }  # fmt: skip
    return found | _judged(problem, policy, best.user_attrs["budget"]), policy


def _split_file(problem: Problem, out: Path) -> str:
    """Statistics of the requests that are tuned on, for cache.split: fitted there, it is no oracle on others."""
    file = out / "layer-budget.safetensors"
    layer_budget.train(problem.tuned_on, problem.judged_on).save(file)
    return str(file)


def _picked(front: list[FrozenTrial], pick: str) -> FrozenTrial:
    if pick in OBJECTIVES:
        return min(front, key=lambda trial: (trial.user_attrs["figures"][pick], trial.number))
    chosen = [trial for trial in front if str(trial.number) == pick]
    if not chosen:
        numbers = ", ".join(str(trial.number) for trial in front)
        raise InputError(f"--pick {pick!r}: expected {', '.join(OBJECTIVES)}, or a trial of the front: {numbers}")
    return chosen[0]


def _described(trial: FrozenTrial) -> Values:
    kept = trial.user_attrs
    return {"trial": trial.number, "budget": kept["budget"], "exactness": kept["exactness"], **kept["figures"]} | {
        "document": kept["document"]
    }


def _judged(problem: Problem, policy: Policy, budget: str) -> Values:
    """The picked policy against the untuned default with as many slots, on requests that the search has not seen; and
    on the whole trace, which `sim run` repeats."""
    untuned, tuned = (problem.simulate(problem.judged_on, which, budget) for which in (DEFAULT, policy))
    whole = problem.simulate(problem.trace, policy, budget)
    names = (f"{DEFAULT}, untuned", "tuned")
    return {
        "judged": compare(untuned.values, tuned.values, names),
        "whole_trace": {name: objective(whole) for name, objective in OBJECTIVES.items()}
        | {"tokens_per_s": whole["tokens_per_s"], "hit": whole["hit"], "bounds": whole["bounds"]},
    }
