"""`Residency` and the policies against the contract written down once more in plain Python."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import reference
from cases import Case, cases, decode_trace, log_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Residency, Slots

from moeflow.errors import InputError

WORTHS = {
    "lru": reference.LRU,
    "lfu": reference.LFU,
    "fifo": reference.FIFO,
    "static": reference.Static,
    "belady": reference.Belady,
}


def reference_log(case: Case) -> list[tuple[int, ...]]:
    trace, model, starts = case.trace, case.trace.meta.model, case.trace.step_starts
    layers = len(model.moe_layers)
    present = [[[e for e in choice if e < model.experts] for choice in row] for row in trace.experts.tolist()]
    steps = [present[a:b] for a, b in pairwise(starts)]
    uses = [[{e for row in step for e in row[layer]} for step in steps] for layer in range(layers)]
    cache = case.policy.document["cache"]
    worths = WORTHS[cache["evict"]] if cache.get("bypass", True) else reference.ForcedBelady
    prefetch = case.policy.document["prefetch"]
    model_of_it = reference.Reference(
        worths(uses), case.slots.per_scope, case.slots.scratch, model.top_k, prefetch, cache["stale"]
    )
    model_of_it.experts = model.experts
    for index, rows in enumerate(steps):
        ahead = None
        if prefetch["kind"] == "lookahead":
            column = trace.lookahead[starts[index] : starts[index + 1]].astype(int)
            tokens = np.where(column < model.experts, column, -1).tolist()
            ahead = reference.fixed_distance(tokens, trace.meta.lookahead_distances, prefetch["distance"], layers)
        elif prefetch["kind"] == "oracle":
            ahead = reference.perfect(uses, prefetch["distance"], index)
        model_of_it.step(index, [[row[layer] for row in rows] for layer in range(layers)], ahead)
    return model_of_it.log


@pytest.mark.parametrize("prefetch", ["none", "lookahead", "oracle"])
@pytest.mark.parametrize("evict", WORTHS)
@given(data=st.data())
@settings(max_examples=50)
def test_decisions_are_those_of_the_contract(evict, prefetch, data):
    case = data.draw(cases(evict, prefetch))
    assert list(map(tuple, log_of(case.residency(), case.trace).tolist())) == reference_log(case)


@pytest.mark.parametrize("prefetch", ["none", "lookahead", "oracle"])
@pytest.mark.parametrize("evict", WORTHS)
@given(data=st.data())
@settings(max_examples=25)
def test_so_they_are_by_stale_scores(evict, prefetch, data):
    case = data.draw(cases(evict, prefetch))
    document = case.policy.document
    stale = data.draw(st.integers(1, 3))
    policy = Policy.from_document({**document, "cache": {**document["cache"], "stale": stale}})
    case = replace(case, policy=policy)
    assert list(map(tuple, log_of(case.residency(), case.trace).tolist())) == reference_log(case)


def test_a_victim_is_chosen_by_what_was_known_when_the_step_began():
    """One pool of three slots. After two steps (0, 1) was used at event 0, (0, 0) at 2 and (1, 0) at 3; step 2 uses
    (0, 1) again and then, at event 5, needs a slot for (1, 1). Keys are layer * 3 + expert."""
    trace = decode_trace(3, [[[1], [0]], [[0], [0]], [[1], [1]]])
    victims = {}
    for stale in (0, 1, 2):
        policy = Policy.from_document({"cache": {"evict": "lru", "scope": "global", "stale": stale}})
        log = log_of(policy.residency(trace, Slots((3,)), keep_log=True), trace)
        victims[stale] = dict(log[:, [0, 5]].tolist())[5]
    assert victims[0] == 0
    assert victims[1] == 1, "its use at event 4 is not yet known"
    assert victims[2] == 0, "nor is that of (0, 0) at event 2: the two are level"


def test_stale_scores_need_a_table_of_scores():
    for evict in ("arc", "sieve", "s3fifo"):
        with pytest.raises(InputError, match=f"cache.stale: {evict} finds its victims itself"):
            Policy.from_document({"cache": {"evict": evict, "stale": 1}})
    with pytest.raises(InputError, match=r"cache\.stale: expected a whole number from 0 on, found -1"):
        Policy.from_document({"cache": {"stale": -1}})
    policy = Policy.from_document({"cache": {"evict": "arc"}})
    trace = decode_trace(3, [[[0]]])
    with pytest.raises(ValueError, match="no scores that could be stale"):
        Residency(1, 3, 1, Slots((2,)), policy.residency(trace, Slots((2,))).eviction, stale=1)
