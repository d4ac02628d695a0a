"""Batches from requests that were recorded one by one: several advance in lockstep, one forward pass for all."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from .trace import Trace


def lockstep(trace: Trace, size: int) -> Trace:
    """The same rows in batches of `size` requests: the j-th passes of a group's requests become one pass.

    Groups are taken in the order in which requests begin and run one after the other; a request that has ended leaves
    its group smaller. Assumed: a token's routing does not depend on who shares its batch, which is exact but for
    rounding and for models that drop tokens. Raises InputError for a size below 1.
    """
    if size < 1:
        raise InputError(f"--batch {size}: a batch has at least 1 request")
    recorded = np.repeat(np.arange(len(trace.step_starts) - 1), np.diff(trace.step_starts))
    _, first, request = np.unique(trace.request, return_index=True, return_inverse=True)
    begins = np.argsort(np.argsort(first, kind="stable"), kind="stable")  # requests by when they begin
    group = begins[request] // size
    passes, index = np.unique(np.stack((request, recorded), axis=1), axis=0, return_inverse=True)
    own = np.arange(len(passes)) - np.searchsorted(passes[:, 0], passes[:, 0])  # passes of the request before this one
    turn = own[index.reshape(-1)]
    order = np.lexsort((np.arange(trace.rows), begins[request], turn, group))
    changes = (np.diff(group[order]) != 0) | (np.diff(turn[order]) != 0)
    step = np.concatenate(([0], np.cumsum(changes))) if trace.rows else np.zeros(0, np.int64)
    return trace.reordered(order, step.astype(np.int32))
