"""Where the compiled engine keeps what: names of array entries and columns, and its arrays in groups.

Array code passes arrays, not objects: every function takes only the few that it works on, because each one passed
costs time. All are int64 unless said otherwise; times are picoseconds; key = layer * E + expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# `fixed`: whole numbers that do not change during a run
WHOLE = (
    "LAYERS", "EXPERTS", "SCOPES", "SCRATCH", "TOP_K", "BYPASS",
    "LOOKS_AHEAD",  # something may be planned for later: a prefetch policy or promotions
    "GATED",  # each moment evaluates further gates
    "MOST",  # prefetches per layer-step
    "GRAPH", "DWELL", "SERVICE", "PROMOTE",
    "SHARE",  # of misses that `split` fetches until it knows rates, 16-bit fixed point
    "WAVES", "ISSUE_PS", "LATENCY_PS", "SYNC_PS", "SAMPLE_PS", "POLICY_PS", "SUBMIT_PS", "SUBMIT_BATCHED_PS",
    "ALPHA_PS", "CHUNKS", "READ_ALPHA_PS", "READ_PS", "SHARED_EXPERTS", "EXPERT_LAUNCHES",
    "BYTES_PER_EXPERT",
    "ATTENTION_OPERATIONS",  # per token
    "KEY_OPERATIONS",  # per token and key that it attends to
    "TOKEN_BUDGET",  # of continuous batching; 0: the recorded steps
    "KEY_ROOM",
)  # fmt: skip
(
    LAYERS, EXPERTS, SCOPES, SCRATCH, TOP_K, BYPASS, LOOKS_AHEAD, GATED, MOST, GRAPH, DWELL, SERVICE, PROMOTE, SHARE,
    WAVES, ISSUE_PS, LATENCY_PS, SYNC_PS, SAMPLE_PS, POLICY_PS, SUBMIT_PS, SUBMIT_BATCHED_PS, ALPHA_PS, CHUNKS,
    READ_ALPHA_PS, READ_PS, SHARED_EXPERTS, EXPERT_LAUNCHES, BYTES_PER_EXPERT, ATTENTION_OPERATIONS, KEY_OPERATIONS,
    TOKEN_BUDGET, KEY_ROOM,
) = range(len(WHOLE))  # fmt: skip
WAIT, ON_CPU, SPLIT = range(3)  # SERVICE
AUTO, ONE_WAVE, TWO_WAVES, EACH = range(4)  # WAVES

# `prices` (float64): of experts per launch, of the host per expert, of attention
EXPERT_BYTES, EXPERT_OPERATIONS, BANDWIDTH, FLOPS, EXPERT_LATENCY_S = range(5)
HOST_S, HOST_BESIDE_S, HOST_TOKEN_S = range(5, 8)
ATTENTION_BYTES, KEY_BYTES, ATTENTION_LATENCY_S = range(8, 11)
PRICES = 11

# `clock`: moments, sums and counters
HOST, FREE, BUSY, NOW, LINK_FREE, LINK_ASKED, LINK_BUSY, HEAD, TAIL = range(9)
LANDED, READER_FREE, READS, CORES_FREE, LOGGED, SUBMITTED, PLACES = range(9, 16)
SENT_DEMAND, SENT_STREAM, SENT_PREFETCH, WASTED = range(16, 20)
COUNTED_DEMAND, COUNTED_STREAM, COUNTED_PREFETCH, COUNTED_WASTED = range(20, 24)
LINK_RATE, CORES_RATE, COMPUTED = range(24, 27)  # what the miss service `split` knows, and what it has not been told
MOST_KEYS, ROWS_DONE, DONE = range(27, 30)
CLOCK = 30

# columns of `steps`, and the first four of `of_layers`, counted from 0
START_PS, END_PS, WAIT_PS, BUSY_PS, NEEDED, HIT, LATE, MISS = range(8)
OF_DEMAND, OF_STREAM, OF_PREFETCH, OF_WASTED, ON_HOST = range(8, 13)
STEP_COLUMNS = 13

# columns of `blocks` [BLOCKS]: what a block of this step takes
DEVICE_PS, LAUNCHES, LAST_PS = range(3)  # all of it, in how many launches, the last of them

# columns of `copies` [L*E]
COMPLETE = 0  # when the device has it; never, where it was not asked for
UNSENT = 1  # chunks
SENT_AHEAD = 2  # chunks, by prefetch
TOOK = 3  # link time so far
HOST_HAS = 4  # when the host has read it
AHEAD = 5  # bits: EXPECTED by a coming layer-step, PROMOTED: kept even when not needed there
IN_RAM = 6  # 1: needs no read
COPY_PS = 7  # link time of all chunks
COPY_COLUMNS = 8
EXPECTED, PROMOTED = 1, 2

# rows of `lists` [E]: indices into `needed` unless said otherwise
MISSING = 0  # in demand order
ON_CORES = 1  # misses for the host, in demand order
ORDER, BEST, CHOSEN = 2, 3, 4  # while something is being sorted or picked
ADMITTED, STREAMED = 5, 6
SLOT, VICTIM = 7, 8  # of each of MISSING
ARRIVING, MOMENT = 9, 10  # copies that this layer waits for, and when each may start, later: is complete
READY, FREED = 11, 12  # of each of STREAMED: when its copy may start; when its scratch slot is free again
HELD, IS_LATE = 13, 14  # flags of each of `needed`
LISTS = 15


class Work(NamedTuple):
    """The trace: N rows, R requests, and S recorded steps; and what the blocks of a step take."""

    starts: NDArray[np.int64]  # [S+1]
    batches: NDArray[np.int64]  # [S, 4]: tokens, attended, cached, outputs
    experts: NDArray[np.int16]  # [N, L, K]; ids >= E are absent
    ahead: NDArray[np.int16]  # [N, L+1, D * K'], or tiny
    request: NDArray[np.int64]  # [N], counted from 0
    due: NDArray[np.int64]  # [S]: when all of a step's requests have arrived
    first: NDArray[np.bool_]  # [N]: a request's first row
    last: NDArray[np.bool_]  # [N]: its last
    tables: NDArray[np.int64]  # [most tokens + 1, BLOCKS] picoseconds by tokens, of the head by outputs
    launches: NDArray[np.int64]  # [BLOCKS]
    moe: NDArray[np.int64]  # [layers of the model]: its index among MoE layers, or -1


class Slots(NamedTuple):
    """What `Residency` keeps; see `policies/planning.py`."""

    slot_of: NDArray[np.int32]  # [L, E]
    guard: NDArray[np.uint8]  # [L, E]
    holder: NDArray[np.int64]  # [slots]
    since: NDArray[np.int64]  # [slots]
    first_slot: NDArray[np.int64]  # [scopes+1]
    used: NDArray[np.int64]  # [scopes]
    guarded: NDArray[np.int64]  # [scopes]


class Link(NamedTuple):
    """Copies and what waits for them."""

    copies: NDArray[np.int64]  # [L*E, COPY_COLUMNS]
    expected: NDArray[np.int64]  # [L]: keys of a layer that have AHEAD bits
    queue: NDArray[np.int64]  # [2 * L*E, 2] waiting prefetches: key, ready
    landed: NDArray[np.int64]  # [4 * L*E, 3] complete copies not yet told: end, key, link time


class Batch(NamedTuple):
    """The running step: its rows, its requests, its blocks."""

    formed: NDArray[np.int64]  # [N]: the step's rows
    places: NDArray[np.int64]  # [most rows]: which row of the policy's state each row's request has
    place_of: NDArray[np.int64]  # [requests]
    free_places: NDArray[np.int64]  # [places]
    blocks: NDArray[np.int64]  # [BLOCKS, 3]
    requests: NDArray[np.int64]  # the arrays of `batching.Queue`
    rows: NDArray[np.int64]
    running: NDArray[np.int64]
    counts: NDArray[np.int64]
    figures: NDArray[np.int64]
    order: NDArray[np.int64]  # [N]: the trace's rows as they were run
    sizes: NDArray[np.int64]  # [most steps]: rows of each step


class Layer(NamedTuple):
    """The layer that is being served."""

    chosen: NDArray[np.int16]  # [L, most rows, K]
    ahead: NDArray[np.int16]  # [most rows, D * K']: the gates' ids of this moment
    needed: NDArray[np.int32]  # [E]
    tokens: NDArray[np.int32]  # [E]
    uses: NDArray[np.int32]  # [E] zeros between layers
    lists: NDArray[np.int64]  # [LISTS, E]
    computed: NDArray[np.int64]  # [E] picoseconds on the host, not yet told


class Proposals(NamedTuple):
    """What a prefetch policy writes its proposals to."""

    targets: NDArray[np.int64]  # [most proposals]
    ends: NDArray[np.int64]
    experts: NDArray[np.int32]
    values: NDArray[np.float64]  # [most proposed]


class Run(NamedTuple):
    """Everything that changes."""

    clock: NDArray[np.int64]  # [CLOCK]
    steps: NDArray[np.int64]  # [S, STEP_COLUMNS]
    of_layers: NDArray[np.int64]  # [L, 4]: needed, hit, late, miss
    log: NDArray[np.int64]  # [rows, 6] decisions not yet hashed
    slots: Slots
    link: Link
    batch: Batch
    layer: Layer
    proposals: Proposals
