"""Recordings of other programs become traces; what does not fit is refused; exports come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moeflow.traces import importers
from moeflow.traces.export import export_trace
from moeflow.traces.importers.recording import attempts, steps
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import Trace
from test_format import LAYERS, assert_same, choices, random_trace, spec

from moeflow.errors import InputError

RECORDED = {
    "dsv2lite_nvmoe_decode": ("deepseek-v2-lite", 1396, 4),
    "gptoss20b_mmlu_val_dev_decode": ("gpt-oss-20b", 64751, 242),
    "olmoe_nvmoe_decode": ("olmoe-1b-7b", 897, 3),
    "qwen3_30b_a3b_sparsify_decode": ("qwen3-30b-a3b", 95, 3),
}


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """`--model test` is the model of `random_trace`: MoE layers 1 to 3 of 4, 16 experts, top-4."""
    monkeypatch.setattr(importers, "load_model_spec", lambda name: spec())
    monkeypatch.setattr(importers, "list_model_specs", lambda: ("test",))
    return spec()


def imported(source: Path, **options: Any) -> Trace:
    target = source.parent / "imported.parquet"
    importers.import_trace(source, target, **options)
    return load_trace(target)


def refused(source: Path, **options: Any) -> str:
    target = source.parent / "refused.parquet"
    with pytest.raises(InputError) as caught:
        importers.import_trace(source, target, **{"model": "test", **options})
    assert not target.exists() and not list(source.parent.glob(".*partial"))
    sentence = str(caught.value)
    assert sentence.startswith((str(source.with_suffix("")), str(target))) and "\n" not in sentence
    return sentence


# The recorded files


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_files_keep_every_choice_and_their_origin(shared_traces: Path, tmp_path: Path, name: str) -> None:
    model, tokens, sequences = RECORDED[name]
    source = shared_traces / f"{name}.npz"
    assert importers.import_trace(source, tmp_path / "t.parquet") == tokens
    trace, arrays = load_trace(tmp_path / "t.parquet"), np.load(source)
    sidecar = json.loads(source.with_suffix(".json").read_text())
    assert trace.meta.model.name == model and len(trace.meta.requests) == sequences
    np.testing.assert_array_equal(trace.experts, arrays["expert_ids"])
    np.testing.assert_array_equal(trace.request, arrays["seq_id"])
    np.testing.assert_array_equal(trace.step, np.arange(tokens))  # decode only: every row is a step
    assert trace.meta.licence == sidecar["license"]
    for fact in ("repo", "commit", "collection", "phases"):
        assert trace.meta.recorded[fact] == sidecar[fact]


def test_gptoss_keeps_weights_and_sequence_facts(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "gptoss20b_mmlu_val_dev_decode.npz"
    importers.import_trace(source, tmp_path / "t.parquet")
    trace = load_trace(tmp_path / "t.parquet")
    np.testing.assert_array_equal(trace.weights, np.load(source)["gate_weights"])
    first = trace.meta.requests[0]
    assert (first.prompt_tokens, first.output_tokens, first.domain) == (136, 319, "mmlu_dev/abstract_algebra")
    assert first.stop_reason == "eos" and trace.meta.requests[1].stop_reason == "length"


def test_another_model_than_the_recorded_one_is_refused(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "olmoe_nvmoe_decode.npz"
    with pytest.raises(InputError, match="64 experts per layer, but mixtral-8x7b has 8"):
        importers.import_trace(source, tmp_path / "t.parquet", model="mixtral-8x7b")
    assert not list(tmp_path.iterdir())


# Steps and attempts


def test_prefill_runs_are_one_step_and_decode_rows_one_each() -> None:
    request = np.array([0, 0, 0, 0, 1, 1, 1, 0])
    phase = np.array([0, 0, 1, 1, 0, 0, 1, 0])
    assert steps(request, phase).tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert steps(np.array([0, 1]), np.array([0, 0])).tolist() == [0, 1]


def test_attempts_count_earlier_rows_of_the_same_position() -> None:
    assert attempts(np.array([0, 0, 0, 1, 0]), np.array([5, 6, 5, 5, 5])).tolist() == [0, 0, 1, 0, 2]


# npz


def write_npz(path: Path, sidecar: dict[str, Any] | None = None, **arrays: Any) -> Path:
    rng = np.random.default_rng(0)
    whole = {
        "expert_ids": choices(rng, 16, 10, LAYERS, 4),
        "seq_id": np.repeat([0, 1], 5).astype(np.int32),
        "pos": np.tile(np.arange(5), 2).astype(np.int32),
        "phase": np.tile([0, 0, 0, 1, 1], 2).astype(np.uint8),
    }
    np.savez(path, **{name: array for name, array in {**whole, **arrays}.items() if array is not None})
    if sidecar is not None:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


def test_npz_weights_that_are_nan_where_absent_become_zero(tmp_path: Path, small_model: ModelSpec) -> None:
    ids = choices(np.random.default_rng(0), 16, 10, LAYERS, 4)
    weights = np.full(ids.shape, 0.25, np.float16)
    ids[3, 1, 2:], weights[3, 1, 2:] = 255, np.nan
    trace = imported(write_npz(tmp_path / "a.npz", expert_ids=ids, gate_weights=weights), model="test")
    assert trace.weights is not None and trace.weights[3, 1].tolist() == [0.25, 0.25, 0, 0]
    assert trace.step.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4, 5]


def test_npz_names_its_model_in_the_sidecar(tmp_path: Path, small_model: ModelSpec) -> None:
    sidecar = {"model": "Some/Test-Model (bf16)", "license": "MIT", "moe_layer_indices": [1, 2, 3], "num_experts": 16}
    trace = imported(write_npz(tmp_path / "a.npz", sidecar))
    assert trace.meta.model == small_model and trace.meta.licence == "MIT"
    assert trace.meta.recorded["model"] == "Some/Test-Model (bf16)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_id": None}, "the array seq_id is missing"),
        ({"phase": np.zeros(9, np.uint8)}, "the array phase is uint8 (9,)"),
        ({"expert_ids": np.zeros((10, LAYERS, 4))}, "the array expert_ids is float64"),
        ({"gate_weights": np.zeros((10, LAYERS, 3))}, "gate_weights has shape"),
        ({"expert_ids": np.tile(np.arange(5, dtype=np.uint8), (10, LAYERS, 1))}, "5 experts per token and layer"),
        ({"expert_ids": np.tile(np.arange(13, 17, dtype=np.uint8), (10, LAYERS, 1))}, "row 0, layer 1 names expert 16"),
        ({"expert_ids": np.tile(np.arange(4, dtype=np.uint8), (10, 7, 1))}, "has 7 layers, but test has 3 MoE layers"),
    ],
)
def test_misshapen_npz_is_refused(tmp_path: Path, small_model: ModelSpec, change: dict[str, Any], message: str) -> None:
    assert message in refused(write_npz(tmp_path / "a.npz", **change), form="npz")


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"moe_layer_indices": [1, 2, 9]}, "has layer 9, which the model lacks"),
        ({"moe_layer_indices": [0, 1, 2]}, "has 3 layers, but test has 3 MoE layers (1 to 3)"),
        ({"num_experts": 64}, "has 64 experts per layer, but test has 16"),
        ({"sequences": [1]}, "has an entry of another kind"),
        ({"moe_layer_indices": ["one"]}, "has an entry of another kind"),
        ({"device": float("nan")}, "the metadata is no JSON"),
    ],
)
def test_sidecar_of_another_model_is_refused(
    tmp_path: Path, small_model: ModelSpec, sidecar: dict[str, Any], message: str
) -> None:
    assert message in refused(write_npz(tmp_path / "a.npz", sidecar))


def test_unknown_model_damage_and_endings_are_refused(tmp_path: Path, small_model: ModelSpec) -> None:
    source = write_npz(tmp_path / "a.npz", {"model": "mystery"})
    assert "the model 'mystery', which is not a known one; give --model" in refused(source, model=None)
    source.with_suffix(".json").write_text("{")
    assert "not readable as JSON" in refused(source)
    source.write_bytes(source.read_bytes()[:-30])
    assert "not readable as NumPy arrays" in refused(source)
    (tmp_path / "a.txt").write_text("x")
    assert "'.txt' names no known format; say which with --format" in refused(tmp_path / "a.txt")
    assert "'zip' is not a known format" in refused(source, form="zip")
    assert "no such file" in refused(tmp_path / "missing.npz")


# JSONL and CSV


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return path


def token(position: int | None = None, layers: tuple[int, ...] = (1, 2, 3), **values: Any) -> list[dict[str, Any]]:
    place = {} if position is None else {"position": position}
    return [{"layer": layer, "experts": [layer, 0, 9, 15], **place, **values} for layer in layers]


def test_jsonl_with_nothing_but_layers_and_experts(tmp_path: Path, small_model: ModelSpec) -> None:
    trace = imported(write_lines(tmp_path / "a.jsonl", [*token(), *token()]), model="test")
    assert trace.position.tolist() == [0, 1] and trace.phase.tolist() == [1, 1] and trace.step.tolist() == [0, 1]
    assert trace.experts[1].tolist() == [[1, 0, 9, 15], [2, 0, 9, 15], [3, 0, 9, 15]]
    assert trace.weights is None and trace.meta.recorded["assumed"]


def test_jsonl_layer_by_layer_and_out_of_order(tmp_path: Path, small_model: ModelSpec) -> None:
    records = [*token(0, request=4, step=1, phase="prefill"), *token(1, request=4, step=1, phase="prefill")]
    records += token(0, request=2, step=0, token=7, weights=[0.5, 0.25, 0.125, 0.125])
    records.sort(key=lambda one: -one["layer"])
    trace = imported(write_lines(tmp_path / "a.jsonl", records), model="test")
    assert trace.request.tolist() == [2, 4, 4] and trace.step.tolist() == [0, 1, 1]
    assert trace.phase.tolist() == [1, 0, 0] and trace.token.tolist() == [7, -1, -1]
    assert trace.weights is not None and trace.weights[0, 0].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert "assumed" in trace.meta.recorded and trace.meta.recorded["assumed"] == []


def test_a_repeated_position_is_another_attempt(tmp_path: Path, small_model: ModelSpec) -> None:
    records = [*token(0), *token(1), *token(1)]
    trace = imported(write_lines(tmp_path / "a.jsonl", records), model="test")
    assert trace.position.tolist() == [0, 1, 1] and trace.attempt.tolist() == [0, 0, 1]


def test_missing_layers_and_short_choices_are_absent(tmp_path: Path, small_model: ModelSpec) -> None:
    records = [*token(0), *token(1, layers=(1, 3))]
    records[-1]["experts"] = [5, 6]
    trace = imported(write_lines(tmp_path / "a.jsonl", records), model="test")
    assert trace.experts[1].tolist() == [[1, 0, 9, 15], [255] * 4, [5, 6, 255, 255]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 4 is no JSON object"),
        ("[1]", "line 4 is no JSON object"),
        ({"experts": [1]}, "line 4 lacks 'layer'"),
        ({"layer": 1}, "line 4 lacks 'experts'"),
        ({"layer": "one", "experts": [1]}, "line 4 has a value of the wrong kind"),
        ({"layer": 1, "experts": 7}, "line 4 has a value of the wrong kind"),
        ({"layer": 1, "experts": [1], "phase": "warm-up"}, "line 4 has the phase 'warm-up'; write prefill or decode"),
        ({"layer": 1, "experts": [1.5]}, "line 4 has a value of the wrong kind"),
        ({"layer": 1, "experts": [1], "position": 2**40}, "line 4 has a value of the wrong kind"),
        ({"layer": 2, "experts": [1], "rank": 1, "position": 8}, "line 4 lacks 'rank 0 of its choice'"),
        ({"layer": 9, "experts": [1]}, "has layer 9, which the model lacks"),
        ({"layer": 0, "experts": [1]}, "routes layer 0, which has no router in test"),
        ({"layer": 1, "experts": [99, 1, 2, 3]}, "row 1, layer 1 names expert 99"),
        ({"layer": 1, "experts": [0, 1, 2, 3, 4]}, "has 5 experts per token and layer, but test chooses 4"),
        ({"layer": 1, "experts": [0], "step": 3}, "some records name their step and others do not"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, small_model: ModelSpec, line: Any, message: str) -> None:
    assert message in refused(write_lines(tmp_path / "a.jsonl", [*token(), line]))


def test_jsonl_with_a_repeated_expert_is_refused_by_the_writer(tmp_path: Path, small_model: ModelSpec) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*token(), {"layer": 1, "experts": [3, 3, 1, 2]}])
    with pytest.raises(InputError, match=r"column experts, row 1: choice .* names an expert twice"):
        importers.import_trace(source, tmp_path / "t.parquet", model="test")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("records", [[], [{"layer": 1, "experts": []}]])
def test_jsonl_without_choices_is_refused(tmp_path: Path, small_model: ModelSpec, records: list[Any]) -> None:
    refused(write_lines(tmp_path / "a.jsonl", records))


CSV = {
    "a column per rank": ["pos,layer,expert_0,expert_1,expert_2,expert_3"]
    + [f"{p},{layer},{layer},0,9,15" for p in (0, 1) for layer in (1, 2, 3)],
    "ids in one cell": ["token_idx, layer_id, experts"]
    + [f'{p}, {layer}, "[{layer}, 0, 9, 15]"' for p in (0, 1) for layer in (1, 2, 3)],
    "a line per id": ["position,layer,rank,expert"]
    + [f"{p},{layer},{k},{e}" for layer in (1, 2, 3) for p in (0, 1) for k, e in enumerate((layer, 0, 9, 15))],
}


@pytest.mark.parametrize("shape", CSV)
def test_csv_shapes(tmp_path: Path, small_model: ModelSpec, shape: str) -> None:
    trace = imported(write_lines(tmp_path / "a.csv", CSV[shape]), model="test")
    assert trace.experts.tolist() == [[[layer, 0, 9, 15] for layer in (1, 2, 3)]] * 2
    assert trace.position.tolist() == [0, 1]


def test_csv_without_its_header_is_refused(tmp_path: Path, small_model: ModelSpec) -> None:
    assert "line 2 lacks 'layer'" in refused(write_lines(tmp_path / "a.csv", ["0,1,5", "0,2,5"]))
    assert "no records" in refused(write_lines(tmp_path / "b.csv", []))


# vLLM


def test_vllm_arrays_of_all_layers_with_prompt_lengths(tmp_path: Path, small_model: ModelSpec) -> None:
    rng = np.random.default_rng(0)
    routed = [choices(rng, 16, tokens, LAYERS + 1, 4).astype(np.int16) for tokens in (6, 4)]
    np.savez(tmp_path / "r.npz", a=routed[0], b=routed[1], prompt_tokens=[4, 3])
    trace = imported(tmp_path / "r.npz", model="test")
    np.testing.assert_array_equal(trace.experts, np.concatenate(routed)[:, 1:])  # layer 0 has no router
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 2, 3, 3, 3, 4]
    assert [request.prompt_tokens for request in trace.meta.requests] == [4, 3]
    assert trace.meta.recorded["request_names"] == ["a", "b"]


@pytest.mark.parametrize("folder", [True, False])
def test_vllm_files_without_prompt_lengths_count_as_decode(
    tmp_path: Path, small_model: ModelSpec, folder: bool
) -> None:
    routed = choices(np.random.default_rng(0), 16, 5, LAYERS, 4).astype(np.int16)
    (tmp_path / "r").mkdir()
    np.save(tmp_path / "r" / "x.npy", routed)
    trace = imported(tmp_path / "r" if folder else tmp_path / "r" / "x.npy", model="test")
    np.testing.assert_array_equal(trace.experts, routed)
    assert trace.phase.all() and any("decode" in one for one in trace.meta.recorded["assumed"])


def test_vllm_arrays_of_other_shapes_are_refused(tmp_path: Path, small_model: ModelSpec) -> None:
    np.save(tmp_path / "flat.npy", np.zeros((5, 4), np.int16))
    assert "expected integers [tokens, layers, top-k]" in refused(tmp_path / "flat.npy")
    (tmp_path / "empty").mkdir()
    assert "no array is there" in refused(tmp_path / "empty")


# SGLang


def sglang_pass(step: int, mode: int, positions: list[int], lengths: list[int] | None, ids: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    layers = np.full((LAYERS + 1, len(positions), 8), -1, np.int32)  # padded to 8; layer 0 is dense
    layers[1:, :, :4] = ids.transpose(1, 0, 2)
    return {
        "forward_pass_id": step,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [100 + p for p in positions],
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(layers),
        "misc_objects": [],
    }


def test_sglang_passes_become_steps_and_requests_are_found_by_position(tmp_path: Path, small_model: ModelSpec) -> None:
    torch = pytest.importorskip("torch")
    ids = choices(np.random.default_rng(0), 16, 12, LAYERS, 4).astype(np.int32)
    passes = [
        sglang_pass(7, 1, [0, 1, 2, 0, 1], [3, 2], ids[:5]),
        sglang_pass(8, 2, [3, 2], None, ids[5:7]),
        sglang_pass(10, 3, [3, 4, 0, 1, 2], [1, 1, 3], ids[7:]),
    ]
    placement = torch.arange(15, -1, -1).repeat(LAYERS + 1, 1)  # physical expert p holds logical expert 15 - p
    torch.save({"records": passes[::-1], "last_physical_to_logical_map": placement}, tmp_path / "d.pt")
    trace = imported(tmp_path / "d.pt", model="test")
    np.testing.assert_array_equal(trace.experts, 15 - ids)
    assert trace.step.tolist() == [0] * 5 + [1] * 2 + [2] * 5
    assert trace.request.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 0, 2, 2, 2]
    assert trace.phase.tolist() == [0] * 5 + [1] * 4 + [0] * 3
    assert trace.token[5] == 103


def test_other_sglang_dumps_are_refused(tmp_path: Path, small_model: ModelSpec) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": torch.zeros(3)}, tmp_path / "stat.pt")
    assert "no per-token records" in refused(tmp_path / "stat.pt")
    record = sglang_pass(0, 6, [0], [1], np.zeros((1, LAYERS, 4), np.int32))
    torch.save({"records": [record]}, tmp_path / "draft.pt")
    assert "forward mode 6 is speculative decoding" in refused(tmp_path / "draft.pt")
    torch.save({"records": [{"topk_ids_of_layer": 3, "forward_pass_id": 0}]}, tmp_path / "odd.pt")
    assert "record 0 is not readable" in refused(tmp_path / "odd.pt")
    torch.save(Path("x"), tmp_path / "pickle.pt")  # an object: could run code, so it is not loaded
    assert "not readable as a .pt file of plain values" in refused(tmp_path / "pickle.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    assert "not readable" in refused(tmp_path / "torn.pt")


# Exports come back


def test_jsonl_export_comes_back_whole(tmp_path: Path, small_model: ModelSpec) -> None:
    trace = random_trace(40, optional=False)
    trace.position[:] = np.arange(40)
    weighted = Trace(**{**vars(trace), "weights": random_trace(40).weights})
    assert weighted.weights is not None
    weighted.weights[weighted.experts == 255] = 0
    export_trace(weighted, tmp_path / "t.jsonl")
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 40 * LAYERS
    back = imported(tmp_path / "t.jsonl", model="test")
    for name, array in weighted.columns.items():
        np.testing.assert_array_equal(back.columns[name], array, err_msg=name)


@pytest.mark.parametrize("experts", [16, 257])
def test_npz_export_comes_back_but_for_steps_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    monkeypatch.setattr(importers, "load_model_spec", lambda name: spec(experts))
    trace = random_trace(40, experts)
    export_trace(trace, tmp_path / "t.npz")
    sidecar = json.loads((tmp_path / "t.json").read_text())
    assert sidecar["moe_layer_indices"] == [1, 2, 3] and sidecar["license"] == "CC0-1.0"
    back = imported(tmp_path / "t.npz", model="test")
    for name in ("request", "position", "phase", "experts"):
        np.testing.assert_array_equal(back.columns[name], trace.columns[name], err_msg=name)
    present = trace.experts != trace.absent
    assert trace.weights is not None and back.weights is not None
    np.testing.assert_array_equal(back.weights[present], trace.weights[present])
    assert not back.weights[~present].any()
    assert back.meta.recorded["device"] == "none" and back.meta.requests[0].domain == "code"


def test_recorded_file_exports_to_the_same_arrays(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "olmoe_nvmoe_decode.npz"
    importers.import_trace(source, tmp_path / "t.parquet")
    trace = load_trace(tmp_path / "t.parquet")
    export_trace(trace, tmp_path / "t.npz")
    with np.load(source) as before, np.load(tmp_path / "t.npz") as after:
        assert set(before.files) == set(after.files)
        for name in before.files:
            np.testing.assert_array_equal(before[name], after[name])
    importers.import_trace(tmp_path / "t.npz", tmp_path / "again.parquet")
    again = load_trace(tmp_path / "again.parquet")
    np.testing.assert_array_equal(again.experts, trace.experts)
    assert again.meta.requests == trace.meta.requests and again.meta.licence == trace.meta.licence


def test_exports_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for target, message in (
        (tmp_path / "t.xml", "use .jsonl or .npz"),
        (tmp_path / "no" / "t.npz", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            export_trace(random_trace(3), target)
    assert not list(tmp_path.iterdir())


def test_import_is_repeatable(tmp_path: Path, small_model: ModelSpec) -> None:
    source = write_npz(tmp_path / "a.npz")
    assert_same(imported(source, model="test"), imported(source, model="test"))
