"""Continuous batching: who shares a step, what must hold under any arrivals, and the same from the naive engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import EVICTIONS, PREFETCHES, RTX4090, cases, machines, spec, trace_of, traces
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.sim.batches import recorded_steps
from moeflow.sim.batching import Queue
from moeflow.sim.cost import Batch
from moeflow.sim.events import EventsEngine
from moeflow.sim.feed import ContinuousFeed
from moeflow.sim.measurements import STEP_FIELDS
from moeflow.sim.run import simulate
from moeflow.sim.summary_plot import summary_png
from moeflow.sim.table import print_result
from moeflow.traces.trace import DECODE, DRAFT, PREFILL, REJECTED, Request, Trace
from naive_engine import NaiveEngine
from test_engine_against_naive import run_and_note_waves, setup_of

from moeflow.errors import InputError

PLENTY = 10**9
TIMED = [name for name, cls in EVICTIONS.items() if "future" not in cls.needs]
AHEAD = [name for name, cls in PREFETCHES.items() if "future" not in cls.needs]


def requests_of(*lengths: tuple[int, int], arrivals: list[float] | None = None) -> Trace:
    """One request after the other, each (prompt rows in one pass, decode rows)."""
    rows, step = [], 0
    for request, (prompt, decode) in enumerate(lengths):
        rows += [(step, request, position, PREFILL) for position in range(prompt)]
        rows += [(step + 1 + i, request, prompt + i, DECODE) for i in range(decode)]
        step += 1 + decode
    return trace_of_rows(rows, arrivals)


def trace_of_rows(rows: list[tuple[int, int, int, int]], arrivals: list[float] | None = None) -> Trace:
    """(step, request, position, phase); row n needs expert n % 4."""
    step, request, position, phase = (np.array(column) for column in zip(*rows, strict=True))
    trace = trace_of(spec(1, 4, 1), [(np.arange(len(rows)) % 4)[:, None, None]])
    meta = replace(trace.meta, requests=tuple(Request(r, arrival_s=at) for r, at in enumerate(arrivals or [])))
    return replace(
        trace, meta=meta, step=step.astype(np.int32), request=request.astype(np.int32),
        position=position.astype(np.int32), phase=phase.astype(np.int8),
    )  # fmt: skip


def drawn_passes(trace: Trace, rng: np.random.Generator) -> Trace:
    """Some neighbouring decode rows of a request become one recorded pass, as drafts that are verified together."""
    step = np.arange(trace.rows)
    for request in np.unique(trace.request):
        rows = np.flatnonzero(trace.request == request)
        for before, row in pairwise(rows):
            if row == before + 1 and (trace.phase[[before, row]] == DECODE).all() and rng.random() < 0.4:
                step[row] = step[before]
    flags = np.where((trace.phase == DECODE) & (rng.random(trace.rows) < 0.3), DRAFT | REJECTED, 0)
    return replace(trace, step=step.astype(np.int32), flags=flags.astype(np.uint8))


def formed(trace: Trace, budget: int, room: int = PLENTY, lasts: int = 1) -> list[list[int]]:
    """Rows of every step when each takes `lasts` picoseconds."""
    feed, now, steps = ContinuousFeed(trace, budget, room), 0, []
    while (step := feed.next(now)) is not None:
        steps.append(step.rows.tolist())
        now = step.start_ps + lasts
    return steps


# --- by hand


def test_decode_first_then_prompts_in_chunks_in_order_of_arrival():
    """Request 0: prompt 0-2, decode 3, 4; request 1: prompt 5-8, decode 9; request 2 decodes 10 and has no prompt."""
    trace = requests_of((3, 2), (4, 1), (0, 1))
    assert formed(trace, 4) == [[10, 0, 1, 2], [3, 5, 6, 7], [4, 8], [9]]
    assert formed(trace, 100) == [[10, 0, 1, 2, 5, 6, 7, 8], [3, 9], [4]]
    assert formed(trace, 1) == [[10], [0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]


def test_a_prompt_that_goes_on_after_decoding_never_shares_the_step():
    rows = [(0, 0, 0, PREFILL), (1, 0, 1, DECODE), (2, 0, 2, PREFILL), (2, 0, 3, PREFILL), (3, 0, 4, DECODE)]
    assert formed(trace_of_rows(rows), 100) == [[0], [1], [2, 3], [4]]


def test_rows_of_one_recorded_decode_pass_stay_together_even_above_the_budget():
    """Request 0 decodes rows 0-2 in one pass, then 3; request 1 decodes 4 and then 5."""
    rows = [(0, 0, p, DECODE) for p in range(3)] + [(1, 0, 3, DECODE), (2, 1, 0, DECODE), (3, 1, 1, DECODE)]
    assert formed(trace_of_rows(rows), 2) == [[0, 1, 2], [3, 4], [5]]
    later = trace_of_rows([(s, 1 - r, p, phase) for s, r, p, phase in rows], [0.0, 1e-12])
    assert formed(later, 3) == [[4], [5], [0, 1, 2], [3]], "the pass of three waits until it is the first"


def test_a_request_waits_for_its_arrival_and_the_clock_jumps_over_idle_time():
    trace = requests_of((1, 1), (1, 1), arrivals=[2e-12, 10e-12])
    feed = ContinuousFeed(trace, 8, PLENTY)
    starts = []
    now = 0
    while (step := feed.next(now)) is not None:
        starts.append((step.start_ps, step.rows.tolist()))
        now = step.start_ps + 3
    assert starts == [(2, [0]), (5, [1]), (10, [2]), (13, [3])]


def test_admission_waits_for_the_whole_kv_cache_and_lets_nobody_overtake():
    """Three requests of 4, 5 and 1 keys in room for 6: the small one waits behind the large one."""
    trace = requests_of((2, 2), (3, 2), (1, 0))
    assert formed(trace, 100, room=6) == [[0, 1], [2], [3], [4, 5, 6, 9], [7], [8]]
    assert formed(trace, 100, room=5) == [[0, 1], [2], [3], [4, 5, 6], [7], [8], [9]]


def test_figures_of_two_requests_by_hand():
    """Both at 0; steps: prompt and prompt, decode and decode, decode of request 0 alone."""
    trace = requests_of((2, 2), (1, 1))
    result = simulate(trace, RTX4090, budget=0.5, batching="continuous")
    start, end = (result.measurements.steps[name] / 1e12 for name in ("start_ps", "end_ps"))
    assert result.steps.batches == [Batch(3, 1 + 2 + 1, 3, 2), Batch(2, 3 + 2, 5, 2), Batch(1, 4, 4, 1)]
    assert start[1:].tolist() == end[:-1].tolist()
    gaps = sorted([end[1] - end[0], end[2] - end[1], end[1] - end[0]])
    assert result["tokens"] == 5
    assert result["tokens_per_s"] == pytest.approx(5 / end[2])
    assert result["tpot_s"]["mean"] == pytest.approx(sum(gaps) / 3)
    assert result["tpot_s"]["p50"] == pytest.approx(gaps[1])
    assert result["ttft_s"]["p99"] == pytest.approx(end[0])
    assert result["queue_s"] == {"p50": 0, "p90": 0, "p99": 0}
    model = trace.meta.model
    fixed = RTX4090.device.reserve_bytes + model.dense_bytes + result["budget_bytes"]
    assert result["peak_bytes"] == fixed + (3 + 2) * model.kv_bytes_per_token


def test_queueing_counts_towards_the_first_token():
    """Memory for one request at a time."""
    trace = requests_of((2, 1), (2, 1))
    model = trace.meta.model
    slots = 2 + 2
    need = RTX4090.device.reserve_bytes + model.dense_bytes + slots * model.bytes_per_expert
    machine = replace(RTX4090, device=replace(RTX4090.device, memory_bytes=need + 3 * model.kv_bytes_per_token))
    result = simulate(trace, machine, budget=slots, batching="continuous")
    end = result.measurements.steps["end_ps"] / 1e12
    assert len(end) == 4
    assert result["queue_s"]["p99"] == pytest.approx(end[1])
    assert result["ttft_s"]["p99"] == pytest.approx(end[2])
    assert result["peak_bytes"] == machine.device.memory_bytes


def test_rejected_rows_yield_no_token_and_accepted_ones_come_together():
    """After the prompt one pass of three rows, the last rejected, then one of one."""
    rows = [(0, 0, 0, PREFILL), *((1, 0, p, DECODE) for p in (1, 2, 3)), (2, 0, 3, DECODE)]
    trace = replace(trace_of_rows(rows), flags=np.array([0, 0, 0, DRAFT | REJECTED, 0], np.uint8))
    result = simulate(trace, RTX4090, budget=0.5, batching="continuous")
    end = result.measurements.steps["end_ps"] / 1e12
    assert result["tokens"] == 1 + 2 + 1
    assert result["tpot_s"]["mean"] == pytest.approx((end[2] - end[0]) / 3)


# --- properties


@given(trace=traces(arrivals=True), budget=st.integers(1, 9), slack=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_every_row_once_in_order_within_budget_and_memory(trace, budget, slack, seed):
    trace = drawn_passes(trace, np.random.default_rng(seed))
    keys = {r: int(trace.position[trace.request == r].max()) + 1 for r in np.unique(trace.request).tolist()}
    room = max(keys.values()) + slack
    feed, now, order, steps = ContinuousFeed(trace, budget, room), 0, [], []
    begun, ended = [], []
    while (step := feed.next(now)) is not None:
        rows, requests = step.rows, trace.request[step.rows]
        begun += step.beginning
        alive = {r for r in begun if r not in ended}
        assert sum(keys[r] for r in alive) <= room, "what has begun keeps all of its keys"
        prompts = trace.phase[rows] == PREFILL
        for request in np.unique(requests):
            of_request = rows[requests == request]
            if (trace.phase[of_request] == DECODE).any():
                assert (trace.phase[of_request] == DECODE).all()
                passes = set(trace.step[of_request].tolist())
                assert len(passes) == 1
                whole = (trace.request == request) & (trace.phase == DECODE) & (trace.step == passes.pop())
                assert of_request.tolist() == np.flatnonzero(whole).tolist()
        assert len(rows) <= budget or (len(set(requests.tolist())) == 1 and not prompts.any())
        assert step.start_ps >= now
        ended += step.ending
        order += rows.tolist()
        steps.append(step.batch)
        now = step.start_ps + 10**9 * int(budget % 3)
    assert sorted(order) == list(range(trace.rows)), "nobody starves"
    assert sorted(begun) == sorted(ended) == sorted(keys)
    for request in keys:
        own = [row for row in order if trace.request[row] == request]
        assert own == sorted(own)
    assert feed.most_keys <= room
    assert recorded_steps(feed.trace()).batches == steps


@given(trace=traces(arrivals=True), budget=st.integers(1, 9), slack=st.integers(0, 12))
@settings(max_examples=60)
def test_requests_begin_in_the_order_in_which_they_arrived(trace, budget, slack):
    """With prompts first come, first served, a request begins decoding no earlier than an older one's prompt ends."""
    room = int(trace.position.max()) + 1 + slack
    queue, feed, now, begun = Queue.of(trace), ContinuousFeed(trace, budget, room), 0, []
    prompt = {r: trace.phase[np.flatnonzero(trace.request == r)[0]] == PREFILL for r in queue.ids.tolist()}
    while (step := feed.next(now)) is not None:
        begun += sorted((r for r in step.beginning if prompt[r]), key=queue.ids.tolist().index)
        now = step.start_ps + 10**9
    assert begun == [r for r in queue.ids.tolist() if prompt[r]]


# --- the other engine


def assert_equal(make_setup) -> None:
    setup = make_setup()
    measured, waves = run_and_note_waves(setup)
    naive = NaiveEngine(make_setup(), iter(waves))
    expected = naive.run()
    engine = EventsEngine(make_setup())
    engine.run()
    starts = engine.steps.starts
    ends = [row for step in naive.formed for row in step]
    assert [len(step) for step in naive.formed] == np.diff(starts).tolist()
    np.testing.assert_array_equal(engine.setup.trace.position, setup.trace.position[ends])
    np.testing.assert_array_equal(engine.setup.trace.experts, setup.trace.experts[ends])
    assert measured.most_keys == naive.most_keys
    assert measured.decision_log_sha256 == naive.residency.decision_log_sha256
    for name in STEP_FIELDS:
        assert measured.steps[name].tolist() == expected[name], name
    assert measured.link_busy_ps == naive.link_busy_ps


def tight(setup, slack: int):
    """The same machine with room for the longest request's keys and `slack` more."""
    keys = int(setup.trace.position.max()) + 1 + slack
    used = setup.hardware.device.memory_bytes - setup.kv_room * setup.model.kv_bytes_per_token
    device = replace(setup.hardware.device, memory_bytes=used + keys * setup.model.kv_bytes_per_token)
    return replace(setup, hardware=replace(setup.hardware, device=device))


@given(data=st.data())
@settings(max_examples=60, phases=[Phase.generate])
def test_times_decisions_and_batches_are_those_of_the_naive_engine(data):
    evict, prefetch = data.draw(st.sampled_from(TIMED)), data.draw(st.sampled_from(["none", *AHEAD]))
    case = data.draw(cases(evict, prefetch, arrivals=True))
    case = replace(case, trace=drawn_passes(case.trace, np.random.default_rng(data.draw(st.integers(0, 99)))))
    hardware, budget, slack = data.draw(machines()), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 12))
    assert_equal(lambda: tight(setup_of(case, hardware, token_budget=budget), slack))


# --- whole runs


def test_golden_figures_of_the_bundled_recording():
    """Two requests a second are more than this machine serves; from `sim run`, as the model stands."""
    result = simulate(hw="rtx4090", policy="lru", batching="continuous", arrivals="poisson:2", token_budget=64)
    assert (result["requests"], result["tokens"], result["steps"]) == (208, 6993, 329)
    expected = {
        "tokens_per_s": 59.632192, "hit": 0.254729, "wait_s_per_token": 0.009587, "duration_s": 117.268875,
        "tpot_s": 0.370837, "ttft_s": 0.623302, "queue_s": 0.217484,
    }  # fmt: skip
    found = {name: result[name] for name in expected}
    found |= {
        "tpot_s": result["tpot_s"]["mean"],
        "ttft_s": result["ttft_s"]["p50"],
        "queue_s": result["queue_s"]["p50"],
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert result["peak_bytes"] == 5986582528


def test_a_result_says_how_it_was_batched_and_can_be_shown(capsys):
    trace = requests_of((3, 2), (4, 1))
    result = simulate(trace, RTX4090, budget=0.5, batching="continuous", arrivals="poisson:100", seed=3)
    assert result["batching"] == {
        "kind": "continuous", "token_budget": 2048, "arrivals": "poisson:100", "seed": 3,
    }  # fmt: skip
    assert result["bounds"] is None and result["prefill"] is None
    assert result["exactness"] == "numeric"
    assert any("routing is taken to stay as recorded" in note for note in result["notes"])
    print_result(result)
    shown = capsys.readouterr().out
    assert "all steps" in shown and "time in the queue, p50" in shown and "clairvoyant" not in shown
    assert summary_png(result).startswith(b"\x89PNG")
    assert simulate(trace, RTX4090, budget=0.5, arrivals="poisson:100")["batching"]["seed"] == 0
    recorded = simulate(trace, RTX4090, budget=0.5)
    assert recorded["batching"]["kind"] == "recorded" and recorded["queue_s"] is None


@given(trace=traces(arrivals=True), budget=st.integers(1, 9))
@settings(max_examples=30)
def test_figures_add_up(trace, budget):
    result = simulate(trace, RTX4090, budget=0.99, batching="continuous", token_budget=budget)
    again = simulate(trace, RTX4090, budget=0.99, batching="continuous", token_budget=budget)
    assert result.to_json() == again.to_json()
    assert sum(result["time_share"].values()) == pytest.approx(1)
    steps = result.measurements.steps
    assert (steps["end_ps"][:-1] <= steps["start_ps"][1:]).all()
    assert result.steps.tokens.sum() == trace.rows
    with_prompt = len(np.unique(trace.request[trace.phase == PREFILL]))
    assert result["tokens"] == with_prompt + (trace.phase == DECODE).sum()
    assert result["queue_s"]["p50"] <= result["queue_s"]["p99"]
    if result["ttft_s"] is not None and with_prompt == len(np.unique(trace.request)):
        assert result["queue_s"]["p99"] < result["ttft_s"]["p99"]


def test_more_requests_at_once_bring_more_tokens_and_each_waits_longer():
    trace = requests_of(*[(8, 8)] * 6)
    rare, often = (
        simulate(trace, RTX4090, budget=0.5, batching="continuous", arrivals=f"poisson:{rate}") for rate in (0.1, 1e5)
    )
    assert often["tokens_per_s"] > 10 * rare["tokens_per_s"]
    assert often["tpot_s"]["mean"] > rare["tpot_s"]["mean"]
    assert len(often.steps) < len(rare.steps)


# --- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batching": "contiguous"}, "--batching 'contiguous': expected recorded or continuous"),
        ({"batching": "recorded", "token_budget": 8}, "--token-budget 8: .*add --batching continuous"),
        ({"token_budget": 0}, "--token-budget 0: a step holds at least 1 token"),
        ({"batch": 2}, "--batch 2: --batching continuous forms the batches itself"),
        ({"policy": "belady"}, "policy belady needs the trace's future"),
        ({"policy": {"cache": {"split": "entropy"}}}, "policy policy needs the trace's future"),
    ],
)
def test_what_contradicts_continuous_batching_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        simulate(requests_of((3, 2)), RTX4090, **{"batching": "continuous", "budget": 0.5, **options})


def test_a_schedule_cannot_be_combined():
    document = {
        "predict": {"kind": "next-gate"}, "schedule": {"kind": "two-medoid"},
        "cache": {"evict": "plec", "scope": "global"}, "prefetch": {"kind": "execution-order"},
    }  # fmt: skip
    with pytest.raises(InputError, match="its schedule forms batches, and so does --batching continuous"):
        simulate(requests_of((3, 2)), RTX4090, document, batching="continuous")


def test_a_request_that_never_fits_is_refused_with_the_numbers():
    trace = requests_of((3, 2), (1, 1))
    model = trace.meta.model
    need = RTX4090.device.reserve_bytes + model.dense_bytes + 4 * model.bytes_per_expert
    machine = replace(RTX4090, device=replace(RTX4090.device, memory_bytes=need + 4 * model.kv_bytes_per_token))
    with pytest.raises(InputError, match=r"request 0 can never be admitted: its KV cache of 5 tokens takes .* GiB"):
        simulate(trace, machine, budget=4, batching="continuous")
