"""The device and the host thread on arrays: `Device` and `waves` of the events engine."""

from __future__ import annotations

from ..policies.compiled import bare
from . import layout as at
from .cost import block_ps


@bare
def issue(fixed, clock, launches, device_ps, last_ps, ready):  # type: ignore[no-untyped-def]
    """`Device.run`: a block whose inputs are complete at `ready`; returns how long the device idled for them."""
    able = max(clock[at.FREE], clock[at.HOST] + fixed[at.ISSUE_PS] + fixed[at.LATENCY_PS])
    first = max(able, ready)
    clock[at.HOST] += launches * fixed[at.ISSUE_PS]
    clock[at.FREE] = max(first + device_ps, clock[at.HOST] + fixed[at.LATENCY_PS] + last_ps)
    clock[at.BUSY] += device_ps
    return first - able


@bare
def run_block(fixed, clock, blocks, block):  # type: ignore[no-untyped-def]
    issue(fixed, clock, blocks[block, at.LAUNCHES], blocks[block, at.DEVICE_PS], blocks[block, at.LAST_PS], 0)


@bare
def hold_up(fixed, clock, moment):  # type: ignore[no-untyped-def]
    """`Device.hold_up`: the host thread does nothing until `moment`; returns how much later the device can begin."""
    launched = fixed[at.ISSUE_PS] + fixed[at.LATENCY_PS]
    able = max(clock[at.FREE], clock[at.HOST] + launched)
    clock[at.HOST] = max(clock[at.HOST], moment)
    return max(clock[at.FREE], clock[at.HOST] + launched) - able


@bare
def sync(clock, cost_ps):  # type: ignore[no-untyped-def]
    clock[at.HOST] = max(clock[at.HOST], clock[at.FREE]) + cost_ps
    clock[at.NOW] = clock[at.HOST]


@bare
def submit(fixed, clock):  # type: ignore[no-untyped-def]
    clock[at.HOST] += fixed[at.SUBMIT_BATCHED_PS] if clock[at.SUBMITTED] else fixed[at.SUBMIT_PS]
    clock[at.SUBMITTED] += 1
    return clock[at.HOST]


@bare
def experts_ps(prices, distinct, pairs):  # type: ignore[no-untyped-def]
    return block_ps(
        distinct * prices[at.EXPERT_BYTES], pairs * prices[at.EXPERT_OPERATIONS], prices[at.BANDWIDTH],
        prices[at.FLOPS], prices[at.EXPERT_LATENCY_S],
    )  # fmt: skip


@bare
def wave_end(fixed, prices, host, free, ready, distinct, pairs):  # type: ignore[no-untyped-def]
    """(host, device) free again after one wave: `device.after`."""
    device_ps, launches = experts_ps(prices, distinct, pairs), fixed[at.EXPERT_LAUNCHES]
    first = max(free, host + fixed[at.ISSUE_PS] + fixed[at.LATENCY_PS], ready)
    host += launches * fixed[at.ISSUE_PS]
    return host, max(first + device_ps, host + fixed[at.LATENCY_PS] - (-device_ps // launches))


@bare
def run_wave(fixed, prices, clock, ready, distinct, pairs):  # type: ignore[no-untyped-def]
    device_ps, launches = experts_ps(prices, distinct, pairs), fixed[at.EXPERT_LAUNCHES]
    return issue(fixed, clock, launches, device_ps, -(-device_ps // launches), ready)


@bare
def choose_waves(fixed, prices, clock, tokens, lists, now, hits, hit_pairs, m, pairs):  # type: ignore[no-untyped-def]
    """`waves.choose` among one wave, two, or one per arrival (by moment)."""
    if fixed[at.WAVES] != at.AUTO:
        return fixed[at.WAVES]
    host, free, last = clock[at.HOST], clock[at.FREE], lists[at.MOMENT, m - 1]
    _, best = wave_end(fixed, prices, host, free, last, hits + m, hit_pairs + pairs)
    kind, launches = at.ONE_WAVE, 1
    h, f = host, free
    if hits:
        h, f = wave_end(fixed, prices, h, f, now, hits, hit_pairs)
    _, end = wave_end(fixed, prices, h, f, last, m, pairs)
    if end < best or (end == best and (hits > 0) + 1 < launches):
        kind, best, launches = at.TWO_WAVES, end, (hits > 0) + 1
    for i in range(m):
        h, f = wave_end(fixed, prices, h, f, lists[at.MOMENT, i], 1, tokens[lists[at.ARRIVING, i]])
    if f < best or (f == best and (hits > 0) + m < launches):
        kind = at.EACH
    return kind


@bare
def compute_arrivals(fixed, prices, clock, tokens, lists, now, hits, hit_pairs, m):  # type: ignore[no-untyped-def]
    """Hits and arrivals in waves; returns the exposed wait."""
    if m == 0:
        return run_wave(fixed, prices, clock, now, hits, hit_pairs) if hits else 0
    pairs = 0
    for i in range(m):
        pairs += tokens[lists[at.ARRIVING, i]]
    kind = choose_waves(fixed, prices, clock, tokens, lists, now, hits, hit_pairs, m, pairs)
    last = lists[at.MOMENT, m - 1]
    if kind == at.ONE_WAVE:
        return run_wave(fixed, prices, clock, last, hits + m, hit_pairs + pairs)
    wait = run_wave(fixed, prices, clock, now, hits, hit_pairs) if hits else 0
    if kind == at.TWO_WAVES:
        return wait + run_wave(fixed, prices, clock, last, m, pairs)
    for i in range(m):
        wait += run_wave(fixed, prices, clock, lists[at.MOMENT, i], 1, tokens[lists[at.ARRIVING, i]])
    return wait
