"""The events engine against an independent one: integer for integer."""

from __future__ import annotations

import pytest
from cases import MISS_SERVICES, PREFETCHES, cases, machines
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.sim import waves as waves_module
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.measurements import STEP_FIELDS
from naive_engine import NaiveEngine


def setup_of(case, hardware, **others) -> Setup:
    miss, predictor = case.policy.document["miss"], case.policy.predictor()
    if predictor is not None:
        others |= {"predictions": predictor.predict(case.trace), "predictor_gates": predictor.gates}
        others["predictor_s"] = 7e-6
    return Setup(
        case.trace, case.trace.meta.model, hardware, case.residency(),
        waves=miss["waves"], chunks=miss["chunks"], **others,
    )  # fmt: skip


def run_and_note_waves(setup: Setup):
    """(measurements, kind of waves that each layer-step was computed in)."""
    noted: list[str] = []
    choose = waves_module.choose

    def noting(mode, *rest):
        chosen = choose(mode, *rest)
        noted.append(next(kind for kind in ("1", "2", "each") if choose(kind, *rest) == chosen))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waves_module, "choose", noting)
        return EventsEngine(setup).run(), noted


def assert_equal_to_naive(make_setup) -> None:
    setup = make_setup()
    measured, waves = run_and_note_waves(setup)
    measured_inputs = [residency.input_log().tolist() for residency in setup.residencies]
    naive = NaiveEngine(make_setup(), iter(waves))
    expected = naive.run()
    assert measured.decision_log_sha256 == naive.decision_log_sha256
    assert measured_inputs == [machine.residency.input_log().tolist() for machine in naive.machines]
    for name in STEP_FIELDS:
        assert measured.steps[name].tolist() == expected[name], name
    assert measured.link_busy_ps == naive.link_busy_ps
    assert (measured.ssd_reads, measured.ssd_low_bit_reads) == (naive.ssd_reads, naive.ssd_low_bit_reads)
    assert {tier: wanted for tier, (_, wanted) in measured.tiers.items() if wanted} == dict(naive.wanted)
    assert measured.compute_busy_ps == sum(machine.busy_ps for machine in naive.machines)
    for device, machine in zip(measured.devices, naive.machines, strict=True):
        assert vars(device) == machine.counts | {
            "compute_busy_ps": machine.busy_ps, "link_busy_ps": machine.link_busy_ps,
        }  # fmt: skip
    return measured


@pytest.mark.parametrize("prefetch", ["none", *PREFETCHES])
@given(data=st.data())
@settings(max_examples=40, phases=[Phase.generate])
def test_times_labels_and_traffic_are_those_of_the_naive_engine(prefetch, data):
    case = data.draw(cases(prefetch=prefetch, arrivals=data.draw(st.booleans())))
    hardware = data.draw(machines())
    assert_equal_to_naive(lambda: setup_of(case, hardware))


@pytest.mark.parametrize("miss", MISS_SERVICES)
@given(data=st.data())
@settings(max_examples=25, phases=[Phase.generate])
def test_so_they_are_however_misses_are_served(miss, data):
    case = data.draw(cases(miss=miss))
    hardware = data.draw(machines(near=miss == "near-memory" or None))
    assert_equal_to_naive(lambda: setup_of(case, hardware))


@pytest.mark.parametrize("miss", ["wait", "split", "low-bit", "near-memory"])
@given(data=st.data())
@settings(max_examples=25, phases=[Phase.generate])
def test_so_they_are_wherever_experts_rest(miss, data):
    """Pinned and pageable host memory, and the SSD."""
    case, hardware = data.draw(cases(miss=miss)), data.draw(machines(near=miss == "near-memory" or None))
    total = len(case.trace.meta.model.moe_layers) * case.trace.meta.model.experts
    in_ram = data.draw(st.one_of(st.none(), st.integers(0, total - 1)))
    pinned = data.draw(st.one_of(st.none(), st.integers(0, total if in_ram is None else in_ram)))
    assert_equal_to_naive(lambda: setup_of(case, hardware, experts_in_ram=in_ram, experts_pinned=pinned))
