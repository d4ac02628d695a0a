"""The events engine's recurrences on plain arrays: decide, copy, compute, layer-step by layer-step, in integers.

Everything in `kernel*.py` says in arrays what `Residency`, `Place`, `Device`, `CopyEngine`, `Reader` and `Waves` say in
objects; tests hold the two equal in every figure and every decision. `layout.py` says where what is kept.
"""

from __future__ import annotations

from ..policies.compiled import bare
from . import layout as at
from .batching import ATTENDED, CACHED, HELD_KEYS, OUTPUTS, TOKENS, next_batch
from .batching import START_PS as BATCH_START_PS
from .cost import block_ps
from .kernel_device import run_block, sync
from .kernel_layer import send_ahead, serve_layer, tell_split
from .kernel_link import note_traffic
from .kernel_plan import find_union, plan_proposals, protect_needed, remember_dwell
from .tables import ATTENTION, DENSE, EMBED, GATES, HEAD_BLOCK, ROUTER


@bare
def form_step(fixed, clock, work, batch, step):  # type: ignore[no-untyped-def]
    """The step's rows into `formed` and its batch into `figures`; returns how many rows, 0 at the end."""
    figures, now = batch.figures, clock[at.NOW]
    if fixed[at.TOKEN_BUDGET]:
        rows = next_batch(
            now, fixed[at.TOKEN_BUDGET], fixed[at.KEY_ROOM], batch.requests, batch.rows, batch.running, batch.counts,
            batch.formed, figures,
        )  # fmt: skip
        if rows:
            clock[at.MOST_KEYS] = max(clock[at.MOST_KEYS], figures[HELD_KEYS])
        return rows
    if step == len(work.due):
        return 0
    first, rows = work.starts[step], work.batches[step, 0]
    for row in range(rows):
        batch.formed[row] = first + row
    figures[TOKENS], figures[ATTENDED], figures[CACHED] = rows, work.batches[step, 1], work.batches[step, 2]
    figures[OUTPUTS], figures[BATCH_START_PS] = work.batches[step, 3], max(now, work.due[step])
    return rows


@bare
def price_step(fixed, prices, work, figures, blocks):  # type: ignore[no-untyped-def]
    """What each block of this step takes."""
    tokens, keys = figures[TOKENS], figures[CACHED] + figures[TOKENS]
    for block in range(len(blocks)):
        blocks[block, at.DEVICE_PS] = work.tables[tokens, block]
    blocks[HEAD_BLOCK, at.DEVICE_PS] = work.tables[figures[OUTPUTS], HEAD_BLOCK]
    blocks[ATTENTION, at.DEVICE_PS] = block_ps(
        prices[at.ATTENTION_BYTES] + prices[at.KEY_BYTES] * keys,
        float(tokens * fixed[at.ATTENTION_OPERATIONS] + figures[ATTENDED] * fixed[at.KEY_OPERATIONS]),
        prices[at.BANDWIDTH], prices[at.FLOPS], prices[at.ATTENTION_LATENCY_S],
    )  # fmt: skip
    for block in range(len(blocks)):
        launches = work.launches[block]
        blocks[block, at.LAUNCHES] = launches
        blocks[block, at.LAST_PS] = -(-blocks[block, at.DEVICE_PS] // launches)


@bare
def begin_step(clock, work, batch, step, rows, state, begin):  # type: ignore[no-untyped-def]
    """Requests that appear are given places; every row learns its request's."""
    for row in range(rows):
        of_trace = batch.formed[row]
        request = work.request[of_trace]
        if work.first[of_trace]:
            clock[at.PLACES] -= 1
            batch.place_of[request] = batch.free_places[clock[at.PLACES]]
            begin(batch.place_of[request], state)
        batch.places[row] = batch.place_of[request]
        batch.order[clock[at.ROWS_DONE]] = of_trace
        clock[at.ROWS_DONE] += 1
    batch.sizes[step] = rows


@bare
def end_step(clock, work, batch, rows):  # type: ignore[no-untyped-def]
    for row in range(rows):
        if work.last[batch.formed[row]]:
            batch.free_places[clock[at.PLACES]] = batch.places[row]
            clock[at.PLACES] += 1


@bare
def gather(experts, formed, chosen, layer, rows):  # type: ignore[no-untyped-def]
    """The layer's ids of the step's rows."""
    for row in range(rows):
        for i in range(chosen.shape[2]):
            chosen[layer, row, i] = experts[formed[row], layer, i]


@bare
def look_ahead(  # type: ignore[no-untyped-def]
    fixed, clock, work, run, step, rows, score, value, admit, state, propose, ahead_state
):
    """Prefetches at the beginning of a step, before any layer of it is known."""
    begun, event = clock[at.LOGGED], step * fixed[at.LAYERS] - 1
    plan_proposals(
        fixed, clock, run.log, run.slots, run.layer, run.proposals, work.ahead, run.batch.formed, event, -1, 0, rows,
        fixed[at.MOST], score, value, admit, state, propose, ahead_state,
    )  # fmt: skip
    if fixed[at.DWELL]:
        remember_dwell(clock, run.log, run.slots.since, begun, step)
    if clock[at.LOGGED] > begun:
        clock[at.HOST] += fixed[at.POLICY_PS]
        clock[at.SUBMITTED] = 0
        send_ahead(fixed, clock, run.log, run.link, begun, -1)


def run_steps(  # type: ignore[no-untyped-def]
    touch, admit, value, begin, propose, fixed, prices, work, run, score, state, ahead_state, step, stop
):
    """Steps from `step` on, up to `stop`, the end or a nearly full log; returns the step to go on with."""
    clock, batch, here, slots, layers = run.clock, run.batch, run.layer, run.slots, fixed[at.LAYERS]
    blocks = batch.blocks
    most = 4 * layers * fixed[at.EXPERTS]  # decisions of one step: needs, promotions, proposals before and in it
    while step < stop and clock[at.LOGGED] + most <= len(run.log):
        rows = form_step(fixed, clock, work, batch, step)
        if rows == 0:
            clock[at.DONE] = 1
            break
        clock[at.NOW] = max(clock[at.NOW], batch.figures[BATCH_START_PS])
        clock[at.HOST] = max(clock[at.HOST], clock[at.NOW])
        if step:
            note_traffic(fixed, clock, run.link, run.steps, step - 1)
        run.steps[step, at.START_PS] = clock[at.NOW]
        busy = clock[at.BUSY]
        price_step(fixed, prices, work, batch.figures, blocks)
        run_block(fixed, clock, blocks, EMBED)
        begin_step(clock, work, batch, step, rows, state, begin)
        if fixed[at.GATED]:
            run_block(fixed, clock, blocks, GATES)
            sync(clock, fixed[at.SYNC_PS])
        if fixed[at.LOOKS_AHEAD]:
            look_ahead(fixed, clock, work, run, step, rows, score, value, admit, state, propose, ahead_state)
        for of_model in range(len(work.moe)):
            run_block(fixed, clock, blocks, ATTENTION)
            layer = work.moe[of_model]
            if layer < 0:
                run_block(fixed, clock, blocks, DENSE)
                continue
            run_block(fixed, clock, blocks, ROUTER)
            if fixed[at.GATED]:
                run_block(fixed, clock, blocks, GATES)
            sync(clock, fixed[at.SYNC_PS])
            if fixed[at.SERVICE] == at.SPLIT:
                tell_split(fixed, clock, run.link, here.computed)
            event = step * layers + layer
            gather(work.experts, batch.formed, here.chosen, layer, rows)
            n = find_union(fixed[at.EXPERTS], here.chosen, layer, rows, here.needed, here.tokens, here.uses)
            scope = layer if fixed[at.SCOPES] > 1 else 0
            held = protect_needed(fixed, slots, here.needed, here.lists, layer, scope, n)
            touch(event, layer, here.needed[:n], here.tokens[:n], here.chosen, batch.places[:rows], score, state)
            serve_layer(
                fixed, prices, work, run, step, layer, event, n, held, rows, score, admit, value, propose, state,
                ahead_state,
            )  # fmt: skip
        run_block(fixed, clock, blocks, HEAD_BLOCK)
        sync(clock, fixed[at.SYNC_PS] + fixed[at.SAMPLE_PS])
        run.steps[step, at.BUSY_PS] = clock[at.BUSY] - busy
        run.steps[step, at.END_PS] = clock[at.NOW]
        end_step(clock, work, batch, rows)
        step += 1
    return step
