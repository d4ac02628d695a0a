"""The one state machine that knows which expert is held, in which slot, and protected by whom.

Simulator and live runtime drive the same object with the same events (DESIGN section 3, "the replay contract"):

    request_begins(id) ... request_ends(id), and between them for every step
    step_begins(step) -> fetch_plan(BEFORE_FIRST_LAYER) -> for each MoE layer: routed -> fetch_plan -> layer_done

A step that streams whole layers has the same calls; its plans say so (policies/prefill.py).

State is logical: an expert is held from the moment its copy is planned until it is evicted. No clock here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import DECODE, PREFILL
from .eviction import Eviction
from .miss_service import FETCH, LOW_BIT, NEAR_MEMORY, ON_CPU, SKIP, MissService
from .planning import plan_demand, plan_prefetch, protect, release, take, union
from .prefetch import BEFORE_FIRST_LAYER, Prefetch
from .prefill import Prefill
from .prices import Prices
from .routed import Routed, StepBegun
from .timed import Timed

if TYPE_CHECKING:
    from .predictor import Predicted

DEMAND, STREAM, PREFETCH, CPU, SKIPPED, LOW, NEAR, LENT, WHOLE = range(9)
KINDS = ("demand", "stream", "prefetch", "cpu", "skipped", "low-bit", "near", "lent", "whole")
COPIED, STALLED, TOOK, COMPUTED = range(4)  # kinds of measured time
NEEDED, PREDICTED = 1, 2  # bits of `guard`
KIND, LAYER, EXPERT, SLOT, VICTIM = range(5)  # columns of a fetch plan

# A plan reads: kind, layer, expert, slot, victim key (layer * experts + expert, or -1). What is computed where its
# weights lie, left out or copied at few bits takes no slot: cpu, near, skipped (slot -1), low-bit (a scratch slot).
# A step that streams whole layers (policies/prefill.py) first lends slots (lent: the expert that loses the slot) and
# copies what is not held of a layer into a buffer (whole); what is needed of that is then kept in a slot (demand) or
# computed where it is (stream, its slot in the buffer).
FetchPlan = NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """Where experts may be held: `per_scope[i]` slots in scope i, then `scratch` slots for streamed experts."""

    per_scope: tuple[int, ...]  # one entry per layer, or a single entry for a global pool
    scratch: int = 2

    @property
    def held(self) -> int:
        return sum(self.per_scope)

    @property
    def total(self) -> int:
        return self.held + self.scratch


@dataclass(frozen=True)
class Guards:
    """What keeps prefetches and promotions from doing harm; None and 0 switch a guard off.

    Moving experts without hysteresis loses (llama.cpp #26563: 0.84x; with a dwell time 1.21x).
    """

    dwell: int = 0  # steps an expert stays before anything but demand may evict it
    per_layer: int | None = None  # copies planned per layer-step at most: a budget in experts' bytes
    in_flight: int | None = None  # copies not yet complete at most: only idle link time is used; asks for time


class Residency:
    """`layers` x `experts` experts competing for `slots`, under one eviction and at most one prefetch policy.

    With `stale` = n victims are chosen, and prefetches compared, by the scores as they stood when the step n - 1 steps
    before began, as on a device whose table the host brings up to date once a step; touching goes on.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        slots: Slots,
        eviction: Eviction,
        prefetch: Prefetch | None = None,
        keep_log: bool = False,
        miss_service: MissService | None = None,
        guards: Guards | None = None,
        here: NDArray[np.bool_] | None = None,
        stale: int = 0,
        prefill: Prefill | None = None,
    ) -> None:
        """`here` [layers, experts]: the experts that this device computes, all by default.

        Policies are shown all that the router says, so that they learn from it, but only these are needed here, get
        slots or are fetched ahead.
        """
        if len(slots.per_scope) not in (1, layers):
            raise ValueError(f"slots for {len(slots.per_scope)} scopes, expected 1 or {layers}")
        used = np.ones((layers, experts), np.bool_) if here is None else here
        least = used.reshape(len(slots.per_scope), -1).any(axis=1)  # a scope with nothing to hold needs no slot
        if (np.array(slots.per_scope) < least).any() or slots.scratch < 1:
            raise ValueError("every scope needs a slot, and streaming needs a scratch slot")
        self.layers, self.experts, self.top_k, self.slots = layers, experts, top_k, slots
        self.eviction, self.prefetch = eviction, prefetch
        self.miss_service, self.guards = miss_service or MissService(), guards or Guards()
        self.here = here
        self.slot_of = np.full((layers, experts), -1, np.int32)  # -1: not held
        self.guard = np.zeros((layers, experts), np.uint8)
        self._first_slot = np.concatenate(([0], np.cumsum(slots.per_scope))).astype(np.int64)
        self._holder = np.full(slots.held, -1, np.int64)  # slot -> layer * experts + expert
        self._since = np.zeros(slots.held, np.int64)  # step in which each slot was given away
        self._under_way: set[int] = set()  # keys prefetched and not known to be complete
        self._used = np.zeros(len(slots.per_scope), np.int64)  # slots of each scope that hold something
        self._guarded = np.zeros(len(slots.per_scope), np.int64)  # held experts of each scope under protection
        self._step = 0
        self._event = -1
        self._routed: Routed | None = None
        self._begun: StepBegun | None = None
        self._searches = eviction.searches
        if stale and self._searches:
            raise ValueError("an eviction policy that finds victims itself has no scores that could be stale")
        self.stale, self.prefill = stale, prefill
        self.streaming = False  # this step streams whole layers
        self.streamed_steps = 0
        self._tables: deque[NDArray[np.float64]] | None = deque(maxlen=stale) if stale else None
        self._notified = type(eviction).admitted is not Eviction.admitted
        self._told = type(eviction).proposed is not Eviction.proposed
        self._hash = hashlib.sha256()
        self._unhashed: list[tuple[int, FetchPlan]] = []
        self._log: list[FetchPlan] | None = [] if keep_log else None
        parts: tuple[Timed | None, ...] = (eviction, prefetch, self.miss_service)
        self._timed = [part for part in parts if part is not None and not part.timing_free]
        self._reported: list[tuple[int, int, int, int, int]] = []  # measured times, until the next boundary
        self._inputs: list[tuple[int, ...]] = []
        self._reroutes = type(self.miss_service).reroute is not MissService.reroute
        self._reports = not self.timing_free
        self._promotes = type(self.miss_service).promote is not MissService.promote
        self._proposes = self._promotes or prefetch is not None
        self._serves = type(self.miss_service).serve is not MissService.serve

    @property
    def timing_free(self) -> bool:
        """No decision depends on measured time: nothing that is reported reaches a policy."""
        return not self._timed and self.guards.in_flight is None

    def priced(self, prices: Prices) -> None:
        """What the machine takes for a miss, told once before the first step."""
        self.miss_service.priced(prices)
        if self.prefill is not None:
            self.prefill.priced(prices)

    def request_begins(self, request: int) -> None:
        """Sequence `request` enters the batch."""
        self.eviction.request_begins(request)
        if self.prefetch is not None:
            self.prefetch.request_begins(request)

    def request_ends(self, request: int) -> None:
        """Sequence `request` has left the batch."""
        self.eviction.request_ends(request)
        if self.prefetch is not None:
            self.prefetch.request_ends(request)

    def step_begins(
        self,
        step: int,
        tokens: NDArray[np.int32] | None = None,
        requests: NDArray[np.int32] | None = None,
        phase: int = DECODE,
        lookahead: NDArray[Any] | None = None,
        lookahead_weights: NDArray[np.float16] | None = None,
        predicted: Predicted | None = None,
        columns: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        """A forward pass starts over T tokens: their ids [T] (-1 unknown), sequences [T], 0 prefill or 1 decode.

        `lookahead` [T, D, K']: what gates choose on the tokens' embeddings, and with which probability.
        """
        self._step, self._event = step, step * self.layers - 1
        self._begun = StepBegun(
            self._event, step, phase, tokens, requests, lookahead, lookahead_weights, predicted, columns or {}
        )
        if self.prefill is not None:
            size = next((len(column) for column in (tokens, requests) if column is not None), 0)
            self.streaming = phase == PREFILL and self.prefill.streams(size, self._holder)
            self.streamed_steps += self.streaming
        if self._tables is not None:
            self._tables.append(self.eviction.score.copy())
        self.eviction.step_begins(self._begun)

    def routed(
        self,
        layer: int,
        ids: NDArray[Any],
        weights: NDArray[np.float16] | None = None,
        requests: NDArray[np.int32] | None = None,
        lookahead: NDArray[Any] | None = None,
        columns: dict[str, NDArray[Any]] | None = None,
        lookahead_weights: NDArray[np.float16] | None = None,
        predicted: Predicted | None = None,
    ) -> Routed:
        """The router of MoE layer `layer` chose `ids` [T, K] (ids >= experts are absent entries).

        Classifies the whole set at once against the state before it, protects it, and lets the policies see it.
        """
        self._deliver()
        if self._under_way:
            self._under_way.difference_update(range(layer * self.experts, (layer + 1) * self.experts))
        self._event = self._step * self.layers + layer
        ids = np.ascontiguousarray(ids)
        if self._reroutes:
            ids = self.miss_service.reroute(layer, ids, self.slot_of[layer] >= 0, columns or {})
        needed, tokens = union(ids, self.experts)
        if self.here is not None:
            mine = self.here[layer, needed]
            needed, tokens = needed[mine], tokens[mine]
        held = protect(self.slot_of[layer], self.guard[layer], needed, self._guarded, self._scope(layer))
        self._routed = Routed(
            self._event, self._step, layer, ids, weights, requests, lookahead, needed, tokens, held, columns or {},
            lookahead_weights, predicted,
        )  # fmt: skip
        self.eviction.touch(self._routed)
        return self._routed

    def fetch_plan(self, layer: int) -> FetchPlan:
        """Copies to start, in order: demand, then streams, then prefetches for later layers. Called once.

        Where whole layers are streamed: who is kept or not of the layer that has been routed, then the copies of the
        layer after the next one, whose buffer is free once this layer has been computed.
        """
        if self.streaming:
            plan = self._plan_streaming(layer)
            if len(plan):
                self._record(plan)
            return plan
        plan = _NOTHING if layer == BEFORE_FIRST_LAYER else self._plan_demand(layer)
        if self._proposes:
            plan = np.concatenate((plan, *self._plan_ahead(layer)))
        if len(plan):
            self._record(plan)
        return plan

    def _plan_ahead(self, layer: int) -> list[FetchPlan]:
        """Promotions, for this layer's next step, then prefetches, for layers to come."""
        plans, room = [], self._prefetch_room()
        if self._promotes and layer != BEFORE_FIRST_LAYER:
            wanted = self.miss_service.promote(self._current(layer), self.eviction.score[layer])
            plans.append(self._plan_prefetch(layer, wanted, room))
            room -= len(plans[0])
        if self.prefetch is None:
            return plans
        for target, experts in self._proposals(layer, self.prefetch):
            plan = self._plan_prefetch(target, experts, room)
            room -= len(plan)
            if len(plan):
                self.prefetch.planned(target, plan[:, EXPERT])
            plans.append(plan)
        return plans

    def _proposals(self, layer: int, prefetch: Prefetch) -> list[tuple[int, NDArray[np.int32]]]:
        """(target layer, experts) to fetch ahead."""
        if layer == BEFORE_FIRST_LAYER and self._begun is not None:
            proposals = prefetch.propose_first(self._begun)
        else:
            proposals = prefetch.propose(self._current(layer))
        if self.here is not None:
            proposals = [(target, experts[self.here[target, experts]]) for target, experts in proposals]
        if self._told:
            self.eviction.proposed(self._event, proposals)
        return proposals

    def _prefetch_room(self) -> int:
        """Copies that the guards still allow."""
        room = self.layers * self.experts
        if self.guards.per_layer is not None:
            room = self.guards.per_layer
        if self.guards.in_flight is not None:
            room = min(room, max(0, self.guards.in_flight - len(self._under_way)))
        return room

    def layer_done(self, layer: int, ns: int = 0) -> None:
        """The layer's experts have been computed, `ns` after the layer before: release their protection."""
        self._report(TOOK, layer, -1, 0, ns)
        needed = self._current(layer).needed
        release(self.slot_of[layer], self.guard[layer], needed, self._guarded, self._scope(layer))
        self._routed = None

    def copied(self, layer: int, expert: int, size: int, ns: int) -> None:
        """A copy of `size` bytes that took the link `ns` nanoseconds is complete."""
        self._report(COPIED, layer, expert, size, ns)

    def computed(self, layer: int, expert: int, size: int, ns: int) -> None:
        """The host or a near-memory unit computed an expert of `size` bytes in `ns` nanoseconds."""
        self._report(COMPUTED, layer, expert, size, ns)

    def stalled(self, layer: int, ns: int) -> None:
        """The device waited `ns` nanoseconds for experts of `layer`."""
        self._report(STALLED, layer, -1, 0, ns)

    def _report(self, kind: int, layer: int, expert: int, size: int, ns: int) -> None:
        if self._reports:
            self._reported.append((kind, layer, expert, size, ns))

    def _deliver(self) -> None:
        """Measured time reaches policies just before a layer is routed and at no other moment, and is logged then."""
        for kind, layer, expert, size, ns in self._reported:
            self._inputs.append((self._event, kind, layer, expert, size, ns))
            if kind == COPIED:
                self._under_way.discard(layer * self.experts + expert)
            for part in self._timed:
                if kind == COPIED:
                    part.copied(layer, expert, size, ns)
                elif kind == COMPUTED:
                    part.computed(layer, expert, size, ns)
                elif kind == STALLED:
                    part.stalled(layer, ns)
                else:
                    part.layer_took(layer, ns)
        self._reported.clear()

    def input_log(self) -> NDArray[np.int64]:
        """[n, 6] measured times as delivered: event after which they came in, kind, layer, expert, bytes, nanoseconds.

        Fed to a fresh object after the same events they reproduce its decisions. Empty when `timing_free`.
        """
        return np.array(self._inputs, np.int64).reshape(-1, 6)

    def held(self, layer: int) -> NDArray[np.int64]:
        """Experts of `layer` that are held, ascending."""
        return np.flatnonzero(self.slot_of[layer] >= 0)

    @property
    def decision_log_sha256(self) -> str:
        """Digest of every decision so far: rows (event, kind, layer, expert, slot, victim), little-endian int64."""
        self._hash_decisions()
        return self._hash.hexdigest()

    def decision_log(self) -> NDArray[np.int64]:
        """[n, 6] rows as hashed. Only with `keep_log`."""
        if self._log is None:
            raise ValueError("this Residency was made with keep_log=False")
        self._hash_decisions()
        return np.concatenate([np.zeros((0, 6), np.int64), *self._log])

    def _scope(self, layer: int) -> int:
        return layer if len(self._used) > 1 else 0

    def _record(self, plan: FetchPlan) -> None:
        self._unhashed.append((self._event, plan))
        if len(self._unhashed) == 1024:
            self._hash_decisions()
        if self.guards.dwell:
            taken = plan[(plan[:, KIND] == DEMAND) | (plan[:, KIND] == PREFETCH)]
            self._since[taken[:, SLOT]] = self._step
        if self.guards.in_flight is not None:
            ahead = plan[plan[:, KIND] == PREFETCH]
            self._under_way.update((ahead[:, LAYER] * self.experts + ahead[:, EXPERT]).tolist())

    def _hash_decisions(self) -> None:
        """Many at a time: hashing each by itself would take a third of the time of a decision."""
        if not self._unhashed:
            return
        plans = np.concatenate([plan for _, plan in self._unhashed])
        rows = np.empty((len(plans), 6), "<i8")
        rows[:, 0] = np.repeat([event for event, _ in self._unhashed], [len(plan) for _, plan in self._unhashed])
        rows[:, 1:] = plans
        self._unhashed.clear()
        self._hash.update(rows.data)
        if self._log is not None:
            self._log.append(rows)

    def _current(self, layer: int) -> Routed:
        if self._routed is None or self._routed.layer != layer:
            raise ValueError(f"layer {layer} has not been routed")
        return self._routed

    def _plan_demand(self, layer: int) -> FetchPlan:
        routed = self._current(layer)
        done, elsewhere = routed.held, _NOTHING
        if self._serves:
            done, elsewhere = self._plan_elsewhere(routed)
        if False in done.tolist():  # quicker than all() on a handful
            fetched = self._plan_fetches(routed, done)
            return np.concatenate((fetched, elsewhere)) if len(elsewhere) else fetched
        return elsewhere

    def _plan_streaming(self, layer: int) -> FetchPlan:
        """The same moments of a step that streams whole layers; nothing else is fetched ahead.

        Policies are asked as ever, since they learn from it.
        """
        if self.prefetch is not None:
            self._proposals(layer, self.prefetch)
        if layer == BEFORE_FIRST_LAYER:
            return np.concatenate((self._lend(), *(self._whole(first) for first in range(min(2, self.layers)))))
        plan = self._plan_fetches(self._current(layer), self._current(layer).held)
        streams = plan[:, KIND] == STREAM
        plan[streams, SLOT] = self._buffer(layer)[plan[streams, EXPERT]]
        return plan if layer + 2 >= self.layers else np.concatenate((plan, self._whole(layer + 2)))

    def _lend(self) -> FetchPlan:
        """The buffers' slots are emptied, and out of reach until the step ends."""
        assert self.prefill is not None
        rows = []
        for slot in self.prefill.slots.tolist():
            key = int(self._holder[slot])
            if key < 0:
                continue
            layer, expert = divmod(key, self.experts)
            rows.append((LENT, layer, expert, slot, key))
            self._holder[slot], self.slot_of[layer, expert] = -1, -1
            self._guarded[self._scope(layer)] -= self.guard[layer, expert] > 0
            self.guard[layer, expert] = 0
            self._under_way.discard(key)
            if self._searches:
                self.eviction.evicted(layer, expert)
        self._used = np.minimum(self._used, self.slots.per_scope - self.prefill.lent)
        return np.array(rows, np.int64).reshape(-1, 5)

    def _whole(self, layer: int) -> FetchPlan:
        """What is not held of `layer` is to be copied; what is held stays at least until the layer is routed."""
        scope, held = self._scope(layer), self.slot_of[layer] >= 0
        self._guarded[scope] += np.count_nonzero(held & (self.guard[layer] == 0))
        self.guard[layer, held] |= PREDICTED
        missing = np.flatnonzero(~held)
        plan = np.full((len(missing), 5), -1, np.int64)
        plan[:, KIND], plan[:, LAYER], plan[:, EXPERT] = WHOLE, layer, missing
        plan[:, SLOT] = self._buffer(layer)[missing]
        return plan

    def _buffer(self, layer: int) -> NDArray[np.int64]:
        """[experts] the slots through which `layer` is streamed."""
        assert self.prefill is not None
        slots: NDArray[np.int64] = self.prefill.buffers[layer % 2]
        return slots

    def _limits(self, scope: int) -> NDArray[np.int64]:
        """First slot of each scope; that after `scope` begins where what it has lent does."""
        if not self.streaming or self.prefill is None:
            return self._first_slot
        limits = self._first_slot.copy()
        limits[scope + 1] -= self.prefill.lent[scope]
        return limits

    def _plan_elsewhere(self, routed: Routed) -> tuple[NDArray[np.bool_], FetchPlan]:
        """[n] which needed experts are not to be fetched, and the plan for the missing ones among them."""
        missing = np.flatnonzero(~routed.held)
        missing = missing[np.argsort(-routed.tokens[missing], kind="stable")]
        wanted = routed.needed[missing]
        services = self.miss_service.serve(routed, wanted, self.eviction.score[routed.layer, wanted])
        if services is None:
            return routed.held, _NOTHING
        done, rows, streams = routed.held.copy(), [], 0
        for at, service in zip(missing.tolist(), services.tolist(), strict=True):
            if service == FETCH:
                continue
            done[at] = True
            slot = -1
            if service == LOW_BIT:
                slot, streams = self.slots.held + streams % self.slots.scratch, streams + 1
            rows.append((_KIND_OF[service], routed.layer, int(routed.needed[at]), slot, -1))
        return done, np.array(sorted(rows, key=lambda row: row[0]), np.int64).reshape(-1, 5)

    def _plan_fetches(self, routed: Routed, done: NDArray[np.bool_]) -> FetchPlan:
        if self._searches:
            return self._plan_demand_searching(routed, done)
        scope = self._scope(routed.layer)
        plan = plan_demand(
            routed.layer, routed.needed, routed.tokens, done, scope, self.eviction.bypass,
            self.slots.scratch, self._seen(), self.slot_of, self.guard, self._holder, self._limits(scope),
            self._used, self._guarded,
        )  # fmt: skip
        if self._notified:
            for row in plan[plan[:, KIND] == DEMAND]:
                self.eviction.admitted(self._event, routed.layer, int(row[EXPERT]))
        return plan

    def _plan_demand_searching(self, routed: Routed, done: NDArray[np.bool_]) -> FetchPlan:
        """The same plan for a policy that finds victims itself, one miss after the other."""
        misses = routed.needed[~done][np.argsort(-routed.tokens[~done], kind="stable")]
        demand: list[tuple[int, ...]] = []
        streams: list[tuple[int, ...]] = []
        for expert in misses.tolist():
            taken = self._take_slot(routed.layer, expert, NEEDED)
            if taken is None:
                slot = self.slots.held + len(streams) % self.slots.scratch
                streams.append((STREAM, routed.layer, expert, slot, -1))
            else:
                demand.append((DEMAND, routed.layer, expert, *taken))
        return np.array(demand + streams, np.int64).reshape(-1, 5)

    def _take_slot(
        self, layer: int, expert: int, protection: int, newest: int = np.iinfo(np.int64).max
    ) -> tuple[int, int] | None:
        """(slot, victim key or -1) for an expert under a policy that finds victims itself; None when there is none."""
        scope = self._scope(layer)
        first, last = self._limits(scope)[scope : scope + 2]
        if self._used[scope] < last - first:
            slot, victim = int(first + self._used[scope]), -1
            self._used[scope] += 1
        else:
            keys = self._holder[first:last]
            evictable = np.sort(keys[(self.guard.ravel()[keys] == 0) & (self._since[first:last] <= newest)])
            if not len(evictable):
                return None
            victim = self.eviction.victim(scope, evictable)
            slot = int(self.slot_of.ravel()[victim])
            self.eviction.evicted(*divmod(victim, self.experts))
        key = layer * self.experts + expert
        take(slot, key, layer, expert, protection, self.slot_of, self.guard, self._holder, self._guarded, scope)
        self.eviction.admitted(self._event, layer, expert)
        return slot, victim

    def _plan_prefetch(self, target: int, experts: NDArray[np.int32], most: int) -> FetchPlan:
        newest = self._step - self.guards.dwell
        if self._searches:
            return self._plan_prefetch_searching(target, experts, most, newest)
        entering, table = self._values(target, experts), self._seen()
        values, before = entering, None
        if self._tables is not None:
            values, before = self._values_seen(target, experts), table[target].copy()
        plan = plan_prefetch(
            target, experts, values, self._scope(target), self.top_k, most, table, self.slot_of,
            self.guard, self._holder, self._since, newest, self._first_slot, self._used, self._guarded,
        )  # fmt: skip
        if before is not None:  # who enters does so in the table that is kept, not in the stale one
            table[target] = before
            taken = np.isin(experts, plan[:, EXPERT])
            self.eviction.score[target, experts[taken]] = entering[taken]
        if self._notified:
            for row in plan:
                self.eviction.admitted(self._event, target, int(row[EXPERT]))
        return plan

    def _values(self, target: int, experts: NDArray[np.int32]) -> NDArray[np.float64]:
        """What `experts` of layer `target` are worth if they are copied ahead."""
        if self._routed is not None and target == self._routed.layer:  # a promotion: its use has been counted
            return self.eviction.score[target, experts]
        value = self.eviction.prefetch_value
        return np.array([value(self._event, target, int(e)) for e in experts], np.float64)

    def _values_seen(self, target: int, experts: NDArray[np.int32]) -> NDArray[np.float64]:
        """The same, by the stale scores."""
        kept, self.eviction.score = self.eviction.score, self._seen()
        values = self._values(target, experts)
        self.eviction.score = kept
        return values

    def _seen(self) -> NDArray[np.float64]:
        """The scores by which victims are chosen."""
        return self._tables[0] if self._tables else self.eviction.score

    def _plan_prefetch_searching(self, target: int, experts: NDArray[np.int32], most: int, newest: int) -> FetchPlan:
        """A policy without values cannot say that a victim is worth less: every prefetch is admitted in order."""
        scope = self._scope(target)
        plan: list[tuple[int, ...]] = []
        room = int(self._first_slot[scope + 1] - self._first_slot[scope]) - self.top_k
        for expert in experts.tolist():
            held = self.slot_of[target, expert] >= 0
            if (not held or not self.guard[target, expert]) and self._guarded[scope] >= room:
                break
            if held:
                self._guarded[scope] += self.guard[target, expert] == 0
                self.guard[target, expert] |= PREDICTED
                continue
            if len(plan) == most:
                continue
            taken = self._take_slot(target, expert, PREDICTED, newest)
            if taken is None:
                break
            plan.append((PREFETCH, target, expert, *taken))
        return np.array(plan, np.int64).reshape(-1, 5)


_NOTHING: FetchPlan = np.zeros((0, 5), np.int64)
_KIND_OF = {ON_CPU: CPU, SKIP: SKIPPED, LOW_BIT: LOW, NEAR_MEMORY: NEAR}
