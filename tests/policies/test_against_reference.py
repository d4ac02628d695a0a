"""`Residency` and the policies against the contract written down once more in plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import reference
from cases import Case, cases, log_of
from hypothesis import given, settings
from hypothesis import strategies as st

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
    model_of_it = reference.Reference(worths(uses), case.slots.per_scope, case.slots.scratch, model.top_k, prefetch)
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
