"""The published anchors: what is stated, how errors are counted, and that the report is what the script writes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from moeflow.hwprofiles.profile import load_hardware
from moeflow.traces.models import load_model_spec

FOLDER = Path(__file__).parents[1] / "experiments" / "anchors"
CHEAP = ("llama-ncmoe", "llama-x4")  # seconds; the others take a minute


@pytest.fixture(scope="module")
def anchors() -> SimpleNamespace:
    """The modules of the experiment, which is a folder of scripts and no package."""
    names = ("figures", "ktransformers", "llama", "imp_ablation", "popularity", "replays", "report", "placed")
    sys.path.insert(0, str(FOLDER))
    try:
        return SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def on_path(monkeypatch):
    """Policies name `placed:Placed`."""
    monkeypatch.syspath_prepend(FOLDER)


# --- what is published


def test_every_anchor_says_where_when_and_on_what(anchors):
    for name, anchor in anchors.figures.load_anchors().items():
        assert anchor.figures, name
        for key in ("title", "model", "hardware", "settings"):
            assert len(anchor.facts[key]) > 3, (name, key)


def test_every_figure_is_replayed_or_says_why_not_in_some_part(anchors):
    parts = {part.anchor for part in anchors.report.PARTS.values()}
    assert parts == set(anchors.figures.load_anchors())


BROKEN = {
    "no source": ({"source": None}, "no address"),
    "a date in words": ({"date": "last week"}, "no date"),
    "no value": ({"figures": {"a": {"what": "a"}}}, "give a value"),
    "upside down": ({"figures": {"a": {"what": "a", "low": 2, "high": 1}}}, "give a value"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_anchor_is_refused(anchors, tmp_path, case):
    changes, sentence = BROKEN[case]
    good = yaml.safe_load((FOLDER / "published.yaml").read_text())["llama-ncmoe"]
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump({"mine": {**good, **changes}}))
    with pytest.raises(ValueError, match=sentence):
        anchors.figures.load_anchors(path)


def test_a_missing_key_is_named(anchors, tmp_path):
    good = yaml.safe_load((FOLDER / "published.yaml").read_text())["llama-ncmoe"]
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump({"mine": {k: v for k, v in good.items() if k != "hardware"}}))
    with pytest.raises(ValueError, match="mine: hardware missing"):
        anchors.figures.load_anchors(path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_machines_links_and_models_load(path):
    kind = yaml.safe_load(path.read_text()).get("kind")
    if kind == "machine":
        hardware = load_hardware(str(path))
        assert not hardware.calibrated
        assert all(source for source in hardware.sources.values())
    elif path.stem == "qwen3.8-flash-next":
        assert load_model_spec(path).routed_bytes / 1e9 == pytest.approx(65, rel=0.01)
        assert load_model_spec(path).bytes_per_expert / 1e6 == pytest.approx(2.65, rel=0.01)


# --- errors


def figure(anchors, low, high=None, **more):
    given = {"name": "f", "what": "f", "half": anchors.figures._half_digit(low), "unit": "x"}
    return anchors.figures.Figure(**{**given, "low": low, "high": high or low, **more})


def test_errors_are_signed_and_zero_within_a_range(anchors):
    assert figure(anchors, 50.0).error(60.0) == pytest.approx(0.2)
    assert figure(anchors, 50.0).error(40.0) == pytest.approx(-0.2)
    wide = figure(anchors, 10.0, 20.0)
    assert [wide.error(x) for x in (5.0, 15.0, 30.0)] == pytest.approx([-0.5, 0.0, 0.5])


def test_an_interval_reaches_what_its_author_rounded(anchors):
    assert figure(anchors, 89).inside((56.7, 88.6))
    assert not figure(anchors, 89).inside((56.7, 88.4))
    assert figure(anchors, 24.98).inside((24.985, 30.0))
    assert not figure(anchors, 24.98).inside((25.0, 30.0))


def test_a_gain_predicted_as_loss_is_on_the_wrong_side(anchors):
    gain, either = figure(anchors, 1.5), figure(anchors, 0.9, 1.2)
    assert gain.same_side(1.1) and not gain.same_side(0.9)
    assert not either.same_side(1.1) and not either.same_side(0.9)


def test_a_ratio_of_ranges_is_as_wide_as_they_allow(anchors):
    gain = anchors.figures.load_anchors()["llama-x4"].figures["gain-x4"]
    assert (gain.low, gain.high) == pytest.approx((1 / 35, 8 / 35))


# --- replays


def test_popular_experts_cover_what_they_were_chosen_for(anchors):
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 1]]], np.uint8)  # [T, L=1, K]
    sequence = np.array([0, 0, 1, 1], np.int32)
    found = anchors.popularity.measure(ids, sequence, 4)
    # `frequency` at half of 4 experts: request 0 by {0, 1} covers 3 of 4, request 1 by {0, 1} or ties covers all
    assert found["frequency"]["0.5"] == pytest.approx(7 / 8)
    # `dynamic`: first rows name {0, 1} twice; second halves need {0, 2} and {0, 1}
    assert found["dynamic"]["0.5"] == pytest.approx(3 / 4)


def test_a_placement_holds_its_share_and_time_falls_with_it(anchors, on_path):
    model, hardware = load_model_spec("qwen3-30b-a3b"), load_hardware("rtx4090")
    few, many = (anchors.replays.spread(hardware, model, share) for share in (0.1, 0.3))
    assert few.hit == pytest.approx(0.1, abs=0.02)
    assert many.hit == pytest.approx(0.3, abs=0.02)
    assert anchors.replays.host_layers(hardware, model, 48).value < few.value < many.value


def test_a_cache_is_sized_by_its_hit_rate(anchors):
    model, hardware = anchors.imp_ablation.model(), anchors.replays.machine("imp-5090")
    found = anchors.replays.cache_at_hit(hardware, model, anchors.imp_ablation.LRU, 0.7)
    assert found.hit == pytest.approx(0.7, abs=anchors.replays.NEAR)
    assert 0 < found.slots < 48 * 128


# --- the report


@pytest.mark.parametrize("part", CHEAP)
def test_the_report_is_what_the_script_writes(anchors, part):
    text = anchors.report.report(anchors.figures.load_anchors(), (part,))
    assert text.strip() in (FOLDER / "README.md").read_text(), "run python experiments/anchors/report.py"


def test_the_report_has_every_figure(anchors):
    page = (FOLDER / "README.md").read_text()
    for anchor in anchors.figures.load_anchors().values():
        assert anchor.facts["source"] in page
        for published in anchor.figures.values():
            assert f"| {published.what} | {published}" in page


def test_a_wrong_sign_stands_out_and_a_gap_says_why(anchors):
    report, rates = anchors.report, anchors.figures.load_anchors()["llama-ncmoe"].figures
    predicted = anchors.replays.Predicted
    wrong = report.table([report.Row("p", rates["ncmoe-cards"], predicted(0.5))])[-1]
    assert "**wrong side of 1**" in wrong
    gap = report.table([report.Row("p", rates["ncmoe-4090"], predicted.none("nobody knows"))])[-1]
    assert "cannot be replayed: nobody knows" in gap
