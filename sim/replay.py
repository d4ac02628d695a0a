"""Hits, misses and streams of an eviction policy, without a clock: the replay contract on flat arrays.

The same counts as driving `Residency` (policies/residency.py) through the trace, to the last one; it keeps no
decision log. An *access* is one expert that a layer-step needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import bare, compiled
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..policies.steps import admit_nothing
from ..traces.trace import Trace
from .needs import Needs, needs_of
from .run import load_policy
from .scoring import Scoring, gather, most_worth_first, order_of, room_for_choices, scoring_of

OUT = -1
OPEN, SHUT = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Replay:
    """Counts per MoE layer, [L] each. A miss is a copy; `streams` are those misses that got no slot."""

    accesses: NDArray[np.int64]
    misses: NDArray[np.int64]
    streams: NDArray[np.int64]

    @property
    def hits(self) -> NDArray[np.int64]:
        return self.accesses - self.misses

    @property
    def hit_rate(self) -> float:
        return float(self.hits.sum() / max(1, self.accesses.sum()))


def replay(trace: Trace, policy: Policy | str | dict[str, Any], slots: Slots) -> Replay:
    """Replay all steps of `trace`, prefill too, from a cold start.

    Raises InputError for a policy that does more than evict, or whose eviction has no compiled step.
    """
    if len(slots.per_scope) not in (1, len(trace.meta.model.moe_layers)):
        raise ValueError(f"slots for {len(slots.per_scope)} scopes, expected 1 or {len(trace.meta.model.moe_layers)}")
    needs = needs_of(trace)
    return replay_scoring(needs, scoring_of(load_policy(policy), trace, needs, slots), slots)


def replay_scoring(needs: Needs, scoring: Scoring, slots: Slots) -> Replay:
    """The same for a policy that has been started; `scoring` stays as it was."""
    slots_of = np.array(slots.per_scope, np.int64)
    pooled = len(slots_of) == 1
    if scoring.by_recency:
        return Replay(needs.of_layer, *_lru(needs, slots_of, pooled))
    table = _table(needs, len(slots_of))
    scoring.run(_lowest_score, needs, table, slots_of, pooled, scoring.steps[1] is not admit_nothing)
    return Replay(needs.of_layer, table.misses, table.streams)


@compiled
def _lru(needs, slots, pooled):  # type: ignore[no-untyped-def]
    """LRU as one list per scope, most recent first: an access is O(1).

    Of one layer-step the highest id stands first, since ties go to the lowest. `after` and `before` are circular, with
    one sentinel per scope behind the keys; who is not held is its own neighbour, so that taking it out changes nothing.
    """
    layers, experts, begin, expert, demand = needs.layers, needs.experts, needs.begin, needs.expert, needs.demand
    keys = layers * experts
    misses, streams = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    used = np.zeros(len(slots), np.int64)
    after = np.arange(keys + len(slots)).astype(np.int32)
    before = after.copy()
    layer = -1
    for event in range(len(begin) - 1):
        layer = layer + 1 if layer + 1 < layers else 0
        scope = 0 if pooled else layer
        first, last, base, end = begin[event], begin[event + 1], layer * experts, keys + scope
        missing = 0
        for i in range(first, last):
            key = base + expert[i]
            newer, older = before[key], after[key]
            after[newer] = older
            before[older] = newer
            missing += newer == key
        misses[layer] += missing
        unfit = max(0, last - first - slots[scope])
        for _ in range(used[scope] + missing - slots[scope] - unfit):
            victim = before[end]
            before[end] = before[victim]
            after[before[victim]] = end
            after[victim] = victim
            before[victim] = victim
        used[scope] = min(slots[scope], used[scope] + missing)
        newest = after[end]
        if unfit:
            streams[layer] += unfit
            _leave_out(demand[first:last], base, missing - unfit, before)
        for i in range(first, last):
            key = base + expert[i]
            if unfit and before[key] == OUT:
                before[key] = key
                continue
            after[key] = newest
            before[newest] = key
            newest = key
        before[newest] = end
        after[end] = newest
    return misses, streams


@bare
def _leave_out(demand, base, room, before):  # type: ignore[no-untyped-def]
    """Mark the misses that are streamed: all but the first `room`."""
    for expert in demand:
        if before[base + expert] == base + expert:
            if room <= 0:
                before[base + expert] = OUT
            room -= 1


class Table(NamedTuple):
    """What the replay of a score table works on, all zero, shut or out of use at first.

    `floor` is OPEN for what may be evicted, SHUT for everything else; max(order of the score, floor) competes, and is
    kept in `worth` while victims are looked for. In one pool the layers' lowest play a tournament: the winner of 2i and
    2i + 1 stands at i.
    """

    misses: NDArray[np.int64]  # [L]
    streams: NDArray[np.int64]  # [L]
    used: NDArray[np.int64]  # [scopes]
    held: NDArray[np.bool_]  # [L*E]
    floor: NDArray[np.int64]  # [L*E]
    worth: NDArray[np.int64]  # [L*E]
    lowest: NDArray[np.int64]  # [2 * entrants]
    winner: NDArray[np.int64]  # [2 * entrants]
    missing: NDArray[np.int64]  # [E] keys, in the order in which they choose
    chosen: NDArray[np.int16]  # [L, most rows of a step, K]


def _table(needs: Needs, scopes: int) -> Table:
    keys, entrants = needs.layers * needs.experts, 1
    while entrants < needs.layers:
        entrants *= 2
    winner = np.zeros(2 * entrants, np.int64)
    winner[entrants:] = np.arange(entrants)
    return Table(
        misses=np.zeros(needs.layers, np.int64), streams=np.zeros(needs.layers, np.int64),
        used=np.zeros(scopes, np.int64), held=np.zeros(keys, np.bool_), floor=np.full(keys, SHUT, np.int64),
        worth=np.full(keys, SHUT, np.int64),
        lowest=np.full(2 * entrants, SHUT, np.int64), winner=winner, missing=np.empty(needs.experts, np.int64),
        chosen=room_for_choices(needs),
    )  # fmt: skip


def _lowest_score(  # type: ignore[no-untyped-def]
    touch, admit, open_sequence, needs, table, slots, pooled, notified, bypass, score, state
):
    """Any score table. A touch changes its own layer's scores and, at a step's first layer, anybody's."""
    layers, experts, begin, expert, demand = needs.layers, needs.experts, needs.begin, needs.expert, needs.demand
    tokens, ids, starts, place, opens = needs.tokens, needs.ids, needs.starts, needs.place, needs.opens
    held, floor, worth, missing = table.held, table.floor, table.worth, table.missing
    lowest, winner = table.lowest, table.winner
    misses, streams, chosen = table.misses, table.streams, table.chosen
    scores, used, from_row, to_row = score.reshape(-1), table.used, 0, 0
    layer, step = -1, 0
    for event in range(len(begin) - 1):
        if pooled and event > 0:  # what the last event needed may go again
            _play(lowest, winner, layer, _compete(scores, floor, worth, layer * experts, experts))
        layer += 1
        if layer == layers:
            layer, step = 0, step + 1
        scope = 0 if pooled else layer
        first, last, base = begin[event], begin[event + 1], layer * experts
        missed = 0
        for i in range(first, last):
            key = base + demand[i]
            floor[key] = SHUT
            missing[missed] = key
            missed += not held[key]
        if layer == 0:
            from_row, to_row = starts[step], starts[step + 1]
            for row in range(from_row, to_row):
                if opens[row]:
                    open_sequence(place[row], state)
        gather(ids, from_row, to_row, layer, experts, chosen)
        touch(event, layer, expert[first:last], tokens[first:last], chosen, place[from_row:to_row], score, state)
        if pooled and layer == 0:
            for other in range(layers):
                _play(lowest, winner, other, _compete(scores, floor, worth, other * experts, experts))
        misses[layer] += missed
        if bypass:
            most_worth_first(scores, missing, missed)
        given = min(missed, slots[scope] - used[scope])
        used[scope] += given
        of, least = layer, SHUT
        if given < missed:
            least = _compete(scores, floor, worth, base, experts)
            if pooled:
                _play(lowest, winner, layer, least)
        while given < missed:
            if pooled:
                of, least = winner[1], lowest[1]
            if least == SHUT or (bypass and least >= order_of(scores[missing[given]])):
                break
            victim = _first(worth, of * experts, experts, least)
            floor[victim] = worth[victim] = SHUT
            held[victim] = False
            least = _least(worth, of * experts, experts)
            if pooled:
                _play(lowest, winner, of, least)
            given += 1
        for i in range(given):
            held[missing[i]] = True
            if notified:
                admit(event, layer, missing[i] - base, score, state)
        streams[layer] += missed - given
        for i in range(first, last):
            key = base + expert[i]
            floor[key] = OPEN if held[key] else SHUT


@bare
def _compete(scores, floor, worth, first, many):  # type: ignore[no-untyped-def]
    """Bring `worth` of a layer up to date; returns its least."""
    scores, floor = scores[first : first + many], floor[first : first + many]  # indices from 0, or it goes one by one
    worth = worth[first : first + many]
    lowest = SHUT
    for at in range(many):
        order, least = order_of(scores[at]), floor[at]
        order = order if order > least else least
        worth[at] = order
        lowest = order if order < lowest else lowest
    return lowest


@bare
def _least(worth, first, many):  # type: ignore[no-untyped-def]
    worth = worth[first : first + many]
    lowest = SHUT
    for at in range(many):
        lowest = worth[at] if worth[at] < lowest else lowest
    return lowest


@bare
def _first(worth, first, many, least):  # type: ignore[no-untyped-def]
    """The lowest key that competes with `least`."""
    worth = worth[first : first + many]
    holder = many
    for at in range(many):
        found = at if worth[at] == least else many
        holder = found if found < holder else holder
    return first + holder


@bare
def _play(lowest, winner, layer, worth):  # type: ignore[no-untyped-def]
    """Layer `layer` competes with `worth` from now on; among equals the lowest layer wins."""
    at = (len(lowest) >> 1) + layer
    lowest[at] = worth
    while at > 1:
        rival = at ^ 1
        better = lowest[rival] < worth or (lowest[rival] == worth and winner[rival] < layer)
        worth = lowest[rival] if better else worth
        layer = winner[rival] if better else layer
        at >>= 1
        lowest[at] = worth
        winner[at] = layer
