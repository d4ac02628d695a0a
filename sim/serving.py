"""Figures of a run that was batched continuously: what each request saw, and what came out of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policies.policy import Policy
from ..traces.trace import DECODE, REJECTED, Trace
from .batches import Steps
from .batching import KEYS, Queue
from .cost import picoseconds, seconds
from .events import Setup
from .measurements import Measurements

TOKEN_BUDGET = 2048  # tokens of a step unless told otherwise; chosen here, vLLM's default for a server


def budget_of_a_step(batching: str, token_budget: int | None, batch: int | None, policy: Policy) -> int | None:
    """Tokens of a step in continuous batching; None for recorded steps. Raises InputError for a contradiction."""
    if batching not in ("recorded", "continuous"):
        raise InputError(f"--batching {batching!r}: expected recorded or continuous")
    if batching == "recorded":
        if token_budget is not None:
            raise InputError(
                f"--token-budget {token_budget}: recorded steps have their size; add --batching continuous"
            )
        return None
    if batch is not None:
        raise InputError(f"--batch {batch}: --batching continuous forms the batches itself; leave one of them out")
    if policy.schedule() is not None:
        raise InputError(
            f"policy {policy.name}: its schedule forms batches, and so does --batching continuous; set schedule.kind "
            "to none or replay recorded steps"
        )
    if policy.oracle:
        raise InputError(
            f"policy {policy.name} needs the trace's future, which is not known where batches form while the run goes "
            "on; replay recorded steps or choose another policy"
        )
    budget = TOKEN_BUDGET if token_budget is None else token_budget
    if budget < 1:
        raise InputError(f"--token-budget {budget}: a step holds at least 1 token")
    return budget


def refuse_what_never_fits(setup: Setup) -> None:
    """Each request's KV cache must fit the device when it runs alone. Raises InputError with the numbers."""
    queue, room = Queue.of(setup.trace), setup.kv_room
    worst = int(np.argmax(queue.requests[:, KEYS]))
    keys, per_token = int(queue.requests[worst, KEYS]), setup.model.kv_bytes_per_token
    if per_token and keys > room:
        model, device, slots = setup.model, setup.hardware.device, setup.residency.slots.total
        raise InputError(
            f"request {queue.ids[worst]} can never be admitted: its KV cache of {keys} tokens takes "
            f"{keys * per_token / 2**30:.3f} GiB, and of the {device.memory_bytes / 2**30:.2f} GiB of "
            f"{setup.hardware.name} expert slots ({slots * model.bytes_per_expert / 2**30:.2f}), dense weights "
            f"({model.dense_bytes / 2**30:.2f}) and workspace ({device.reserve_bytes / 2**30:.2f}) leave "
            f"{max(0, room) * per_token / 2**30:.3f}: lower the budget"
        )


def served(trace: Trace, steps: Steps, measured: Measurements) -> dict[str, Any]:
    """`tokens` that came out, `tokens_per_s` over the whole run, `tpot_s` between a request's tokens, `queue_s`.

    `trace` is in the steps that were formed, every request with its arrival.
    """
    start, end = measured.steps["start_ps"], measured.steps["end_ps"]
    order = np.argsort(trace.request, kind="stable")
    request = trace.request[order]
    step = np.repeat(np.arange(len(steps)), steps.tokens)[order]
    first_row = np.flatnonzero(np.diff(request, prepend=-1))
    arrival = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
    queued = start[step[first_row]] - np.array([arrival[int(r)] for r in request[first_row]], np.int64)
    decodes = trace.phase[order] == DECODE
    kept = (trace.flags[order] & REJECTED) == 0
    prompts = int(np.count_nonzero(_prompt_ends(request, decodes)))
    gaps = _between_tokens(request, step, decodes & kept, ~decodes, start, end)
    tokens = prompts + int(np.count_nonzero(decodes & kept))
    figures: dict[str, Any] = {"tokens": tokens, "tokens_per_s": tokens / max(seconds(int(end[-1])), 1e-12)}
    if len(gaps):
        figures["tpot_s"] = {"mean": seconds(int(gaps.sum())) / len(gaps)} | _quantiles(gaps)
    return figures | {"queue_s": _quantiles(queued)}


def _prompt_ends(request: NDArray[np.int32], decodes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows after which a request's prompt is complete: each yields a token."""
    goes_on = np.zeros(len(request), np.bool_)
    goes_on[:-1] = (np.diff(request) == 0) & ~decodes[1:]
    return ~decodes & ~goes_on


def _between_tokens(
    request: NDArray[np.int32],
    step: NDArray[np.int64],
    output: NDArray[np.bool_],
    prompt: NDArray[np.bool_],
    start: NDArray[np.int64],
    end: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Picoseconds from one token to the next of its request, for each token that a decode row gave.

    Tokens of one step come together: the first has waited, the others have not. A request that begins with decoding
    counts from the start of its first step.
    """
    counted = output | prompt
    request, step, output = request[counted], step[counted], output[counted]
    gaps = np.zeros(len(step), np.int64)
    gaps[1:] = end[step[1:]] - end[step[:-1]]
    begins = np.flatnonzero(np.diff(request, prepend=-1))
    gaps[begins] = end[step[begins]] - start[step[begins]]
    return gaps[output]


def _quantiles(times_ps: NDArray[np.int64]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(times_ps, [50, 90, 99], method="inverted_cdf")
    return {"p50": seconds(int(p50)), "p90": seconds(int(p90)), "p99": seconds(int(p99))}
