"""Policy documents: presets, what is refused and how, and a user's own classes."""

from __future__ import annotations

from dataclasses import replace

import moeflow.policies
import numpy as np
import pytest
import yaml
from cases import EVICTIONS, PREFETCHES, decode_trace, log_of
from moeflow.policies import policy as policy_module
from moeflow.policies.eviction import Eviction
from moeflow.policies.policy import DEFAULTS, Policy, find_class, preset_names
from moeflow.policies.prefetch import Prefetch
from moeflow.policies.residency import Slots

from moeflow.errors import InputError

TOY = """
from moeflow.policies.eviction import Eviction

class Highest(Eviction):
    \"\"\"The expert with the highest id goes, but for `spared`.\"\"\"

    def __init__(self, spared: int = -1) -> None:
        super().__init__()
        self.spared = spared

    def touch(self, routed):
        self.score[routed.layer, routed.needed] = [0 if e == self.spared else -e for e in routed.needed]

    def parameters(self):
        return {"spared": self.spared}
"""


def refused(document, *parts: str) -> None:
    """The document is refused in one sentence that contains every part."""
    with pytest.raises(InputError) as caught:
        Policy.from_document(document, where="mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_completes_itself_and_says_what_it_is(name):
    policy = Policy.load(name)
    assert policy.name == name
    assert policy.summary
    assert list(policy.document) == list(DEFAULTS)
    for part, default in DEFAULTS.items():
        assert policy.document[part].keys() >= default.keys()
    assert Policy.from_document(policy.document).document == policy.document
    assert yaml.safe_load(yaml.safe_dump(policy.document)) == policy.document


def test_every_policy_of_the_folder_has_a_preset():
    parts = [Policy.load(name).document for name in preset_names()]
    assert {document["cache"]["evict"] for document in parts} == EVICTIONS.keys()
    assert {document["prefetch"]["kind"] for document in parts} == PREFETCHES.keys() | {"none"}


def test_a_file_a_preset_name_and_a_preset_name_with_suffix_load(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# What I like.\ncache: {evict: lfu}\n")
    assert Policy.load(path).document["cache"] == {"evict": "lfu", "scope": "layer", "split": "uniform", "stale": 0}
    assert (Policy.load(path).name, Policy.load(path).summary) == ("mine", "What I like.")
    assert Policy.load("lru.yaml").document == Policy.load("lru").document


def test_a_file_goes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "lru.yaml").write_text("cache: {evict: fifo}")
    monkeypatch.chdir(tmp_path)
    assert Policy.load("lru.yaml").document["cache"]["evict"] == "fifo"


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert Policy.load(path).document == DEFAULTS


def test_defaults_are_not_changed_by_what_is_loaded():
    before = yaml.safe_dump(DEFAULTS)
    document = {"cache": {"evict": "belady"}, "miss": {"waves": 2}}
    Policy.from_document(document)
    assert yaml.safe_dump(DEFAULTS) == before
    assert document == {"cache": {"evict": "belady"}, "miss": {"waves": 2}}


def test_no_such_policy_names_what_is_near_and_what_there_is():
    with pytest.raises(InputError, match=r"no policy 'lru-globl': did you mean 'lru-global'\? Bundled: .*belady"):
        Policy.load("lru-globl")


def test_a_file_that_is_not_yaml_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("cache: {evict: lru")
    with pytest.raises(InputError, match=r"broken\.yaml: not valid YAML"):
        Policy.load(path)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"binary\.yaml"):
        Policy.load(path)


@pytest.mark.parametrize(
    "document, path, known",
    [
        ({"cach": {}}, "cach", "cache, prefetch, predict, miss, schedule"),
        ({"cache": {"evct": "lru"}}, "cache.evct", ""),
        ({"cache": {"evict": "belady", "bypas": True}}, "cache.bypas", "bypass"),
        ({"cache": {"evict": "lru", "bypass": True}}, "cache.bypass", ""),
        ({"prefetch": {"distance": 1}}, "prefetch.distance", ""),
        ({"prefetch": {"kind": "lookahead", "depth": 1}}, "prefetch.depth", "distance"),
        ({"miss": {"wave": 1}}, "miss.wave", "kind, waves, scratch, chunks"),
        ({"schedule": {"order": "x"}}, "schedule.order", "kind"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_known_ones(document, path, known):
    refused(document, f"{path}: unknown key", known)


@pytest.mark.parametrize(
    "document, path",
    [
        ({"cache": {"evict": "lruu"}}, "cache.evict"),
        ({"cache": {"evict": None}}, "cache.evict"),
        ({"cache": {"evict": "lookahead"}}, "cache.evict"),
        ({"prefetch": {"kind": "lru"}}, "prefetch.kind"),
        ({"cache": {"evict": "no.such.module:X"}}, "cache.evict"),
        ({"cache": {"evict": "moeflow.policies.lru:Nothing"}}, "cache.evict"),
        ({"cache": {"evict": "moeflow.policies.lookahead:Lookahead"}}, "cache.evict"),
        ({"cache": {"scope": "layers"}}, "cache.scope"),
        ({"cache": {"scope": None}}, "cache.scope"),
        ({"cache": "lru"}, "cache"),
        ({"cache": None}, "cache"),
        ({"prefetch": {"kind": "lookahead", "distance": 0}}, "prefetch"),
        ({"prefetch": {"kind": "lookahead", "distance": "far"}}, "prefetch"),
        ({"miss": {"kind": "teleport"}}, "miss.kind"),
        ({"miss": {"waves": 3}}, "miss.waves"),
        ({"miss": {"scratch": 0}}, "miss.scratch"),
        ({"miss": {"scratch": "two"}}, "miss.scratch"),
        ({"miss": {"scratch": True}}, "miss.scratch"),
        ({"miss": {"chunks": 1.5}}, "miss.chunks"),
        ({"schedule": {"kind": "fair"}}, "schedule.kind"),
        ([], "expected the parts"),
        ("lru", "expected the parts"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(document, path):
    refused(document, path)


@pytest.mark.parametrize(
    "document",
    [
        {"cache": {"evict": "belady", "bypass": "no"}},
        {"prefetch": {"kind": "lookahead", "distance": 1.5}},
        {"cache": {"evict": "lfu-aged", "halve_every": 2.5}},
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused(document):
    refused(document)


@pytest.mark.parametrize("waves", [1, 2, "1", "2", "each", "auto"])
def test_waves_may_be_numbers_or_words(waves):
    assert Policy.from_document({"miss": {"waves": waves}}).document["miss"]["waves"] == str(waves)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A user's module on the path; its name."""
    (tmp_path / "users_policies.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    return "users_policies:Highest"


def victims(policy: Policy) -> list[int]:
    trace = decode_trace(5, [[[0]], [[3]], [[2]], [[4]], [[1]]])
    return log_of(policy.residency(trace, Slots((2,)), keep_log=True), trace)[:, 5].tolist()


def test_a_users_class_is_named_by_its_import_path(toy):
    policy = Policy.from_document({"cache": {"evict": toy}})
    assert policy.document["cache"]["spared"] == -1
    assert victims(policy) == [-1, -1, 3, 2, 4]


def test_a_users_class_takes_its_own_parameters_and_no_others(toy):
    assert victims(Policy.from_document({"cache": {"evict": toy, "spared": 3}})) == [-1, -1, 0, 2, 4]
    refused(
        {"cache": {"evict": toy, "spare": 3}},
        "cache.spare: unknown key; known: evict, scope, split, stale, fitted, spared",
    )


def test_a_file_dropped_into_the_folder_is_found_by_name(tmp_path, monkeypatch):
    """Nothing else is edited; a file's underscores are hyphens in documents."""
    (tmp_path / "highest_first.py").write_text(TOY)
    (tmp_path / "wait.py").write_bytes((policy_module.FOLDER / "wait.py").read_bytes())
    monkeypatch.setattr(policy_module, "FOLDER", tmp_path)
    monkeypatch.setattr(moeflow.policies, "__path__", [*moeflow.policies.__path__, str(tmp_path)])
    assert victims(Policy.from_document({"cache": {"evict": "highest-first"}})) == [-1, -1, 3, 2, 4]
    assert find_class(Eviction, "highest-first", "x").__name__ == "Highest"
    refused({"cache": {"evict": "highest"}}, "known: highest-first,")


def test_what_a_document_means_comes_from_its_parts():
    policy = Policy.load("lookahead")
    assert (policy.needs, policy.oracle, policy.timing_free) == (("lookahead",), False, True)
    assert Policy.load("belady").oracle
    assert Policy.load("oracle").needs == ("future",)
    assert Policy.from_document({"cache": {"evict": "hobbit"}, "prefetch": {"kind": "lookahead"}}).needs == (
        "weights",
        "lookahead",
    )


def test_a_policy_that_depends_on_time_says_so(tmp_path, monkeypatch):
    (tmp_path / "timed_policies.py").write_text(
        TOY.replace("    def touch", "    timing_free = False\n\n    def touch")
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert not Policy.from_document({"cache": {"evict": "timed_policies:Highest"}}).timing_free


@pytest.mark.parametrize("name", [n for n in preset_names() if set(Policy.load(n).needs) - {"future"}])
def test_a_trace_without_the_column_is_refused_with_the_columns_name(name):
    policy = Policy.load(name)
    column = next(column for column in policy.needs if column != "future")
    with pytest.raises(InputError, match=f"policy {name} needs the column '{column}'"):
        policy.residency(decode_trace(2, [[[0], [1]]]), Slots((1, 1)))


def test_a_distance_that_the_trace_does_not_have_is_refused_with_those_it_has():
    trace = decode_trace(2, [[[0], [1]]])
    trace = replace(
        trace, meta=replace(trace.meta, lookahead_distances=(1, 3)), lookahead=np.zeros((1, 3, 2, 1), np.uint8)
    )
    with pytest.raises(InputError, match=r"distance 2 .*\[1, 3\].*--lookahead 2"):
        Policy.load("lookahead").residency(trace, Slots((2, 2)))


@pytest.mark.parametrize("base, classes", [(Eviction, EVICTIONS), (Prefetch, PREFETCHES)])
def test_documents_know_exactly_the_policies_of_the_folder(base, classes):
    for name, cls in classes.items():
        assert find_class(base, name, "x") is cls
    with pytest.raises(InputError) as caught:
        find_class(base, "nothing", "x")
    assert f"known: {', '.join(sorted(classes))}, or my.module:Class" in str(caught.value)


def test_show_names_the_source_of_every_part():
    from moeflow.policies.policy_command import app
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, ["show", "expertflow-b"]).output
    for part in ("plec.PLEC", "execution_order.ExecutionOrder", "rpp.RPP", "wait.Wait", "two_medoid.TwoMedoid"):
        assert f"moeflow.policies.{part}" in shown
    assert "2410.17954" in shown
