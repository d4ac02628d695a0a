"""The trace format: what is written comes back, and what is wrong is refused with one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moeflow.traces import writer as writer_module
from moeflow.traces.check import first_fault
from moeflow.traces.columns import METADATA_KEY
from moeflow.traces.model_spec import Attention, ModelSpec
from moeflow.traces.reader import cache_folder, load_trace, read_columns, read_header
from moeflow.traces.trace import Request, Trace, TraceMeta, expert_dtype
from moeflow.traces.writer import TraceWriter, write_trace

from moeflow.errors import InputError

LAYERS = 3


def spec(experts: int = 16, top_k: int = 4) -> ModelSpec:
    return ModelSpec("test", LAYERS + 1, (1, 2, 3), experts, top_k, 8, 8, Attention("gqa", 2, 1, 4), 100)


def choices(rng: np.random.Generator, experts: int, *shape: int) -> np.ndarray:
    """Distinct random ids along the last axis."""
    scores = rng.random((*shape[:-1], experts), dtype=np.float32)
    return np.argsort(scores, axis=-1)[..., : shape[-1]].astype(expert_dtype(experts))


def random_trace(rows: int = 50, experts: int = 16, top_k: int = 4, seed: int = 0, optional: bool = True) -> Trace:
    rng = np.random.default_rng(seed)
    ids = choices(rng, experts, rows, LAYERS, top_k)
    absent = np.iinfo(ids.dtype).max
    ids[rng.random((rows, LAYERS)) < 0.05] = absent
    ids[rng.random((rows, LAYERS)) < 0.05, top_k - 1 :] = absent  # a partly absent choice: the last ranks
    numbers = lambda *shape: rng.random((rows, *shape), dtype=np.float32).astype(np.float16)  # noqa: E731
    columns: dict[str, Any] = {}
    if optional:
        wide = min(experts, top_k + 1)
        lookahead = choices(rng, experts, rows, LAYERS + 1, 2, wide)
        lookahead[:, LAYERS:, 0] = absent  # distances 1 and 3: nothing past the last layer
        lookahead[:, LAYERS - 2 :, 1] = absent
        start = np.sort(rng.integers(0, 10**15, rows))
        columns = {
            "weights": numbers(LAYERS, top_k),
            "step_ns": np.stack((start, start + 5), axis=1),
            "lookahead": lookahead,
            "lookahead_weights": numbers(LAYERS + 1, 2, wide),
            "candidates": choices(rng, experts, rows, LAYERS, min(2 * top_k, experts)),
            "candidate_logits": numbers(LAYERS, min(2 * top_k, experts)),
            "probs": numbers(LAYERS, experts),
            "embedding": numbers(7),
            "sketch": numbers(2, 5),
            "extra": {"temperature": rng.random(rows), "pages": rng.integers(0, 9, (rows, 2, 3)).astype(np.int16)},
        }
    meta = TraceMeta(
        spec(experts, top_k),
        (Request(0, prompt_tokens=3, domain="code"), Request(1, arrival_s=0.25)),
        {"device": "none", "sampling": {"greedy": True}},
        "CC0-1.0",
        (1, 3) if optional else (),
    )
    return Trace(
        meta=meta,
        step=np.sort(rng.integers(0, rows, rows)).astype(np.int32),
        request=rng.integers(0, 2, rows).astype(np.int32),
        position=rng.integers(0, 1000, rows).astype(np.int32),
        token=rng.integers(-1, 100, rows).astype(np.int32),
        phase=rng.integers(0, 2, rows).astype(np.int8),
        attempt=rng.integers(0, 3, rows).astype(np.int16),
        flags=rng.integers(0, 16, rows).astype(np.uint8),
        experts=ids,
        **columns,
    )


def assert_same(one: Trace, other: Trace) -> None:
    assert one.meta == other.meta
    assert one.columns.keys() == other.columns.keys()
    for name, array in one.columns.items():
        assert array.dtype == other.columns[name].dtype
        np.testing.assert_array_equal(array, other.columns[name], err_msg=name)
    assert one.content_sha256 == other.content_sha256


def rewrite(path: Path, document: Any = None, table: pa.Table | None = None) -> None:
    """Put other metadata or columns into a trace file, around the writer's checks."""
    table = pq.read_table(path) if table is None else table
    kept = pq.read_metadata(path).metadata[METADATA_KEY]
    text = kept if document is None else document if isinstance(document, bytes) else json.dumps(document)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: text}), path, use_dictionary=False)


def document_of(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(path).metadata[METADATA_KEY])


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(path, random_trace())
    return path


def refused(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(InputError) as caught:
        load_trace(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and "; " in sentence
    return sentence


# What is written comes back


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    experts=st.sampled_from([4, 16, 254, 255, 256, 257]),
    top_k=st.integers(1, 4),
    optional=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_round_trip(tmp_path: Path, rows: int, experts: int, top_k: int, optional: bool, seed: int) -> None:
    trace = random_trace(rows, experts, top_k, seed, optional)
    path = tmp_path / "t.parquet"
    write_trace(path, trace)
    assert_same(load_trace(path), trace)


@pytest.mark.parametrize(("experts", "dtype"), [(255, np.uint8), (256, np.uint16), (257, np.uint16)])
def test_largest_id_does_not_collide_with_the_absent_mark(tmp_path: Path, experts: int, dtype: type) -> None:
    trace = random_trace(experts=experts, optional=False)
    trace.experts[0, 0] = [experts - 1, 0, 1, np.iinfo(dtype).max]
    write_trace(tmp_path / "t.parquet", trace)
    loaded = load_trace(tmp_path / "t.parquet")
    assert loaded.experts.dtype == dtype and loaded.absent == np.iinfo(dtype).max
    assert (loaded.experts[0, 0] == loaded.absent).tolist() == [False, False, False, True]
    assert loaded.experts[0, 0, 0] == experts - 1


def test_array_columns_are_fixed_size_binary_and_scalars_plain(trace_file: Path) -> None:
    schema = pq.read_schema(trace_file)
    assert schema.field("experts").type == pa.binary(LAYERS * 4) and not schema.field("experts").nullable
    assert schema.field("weights").type == pa.binary(LAYERS * 4 * 2)
    assert schema.field("step").type == pa.int32() and schema.field("phase").type == pa.int8()
    document = document_of(trace_file)
    assert document["format"] == 1
    assert document["columns"]["weights"] == {"dtype": "float16", "shape": [LAYERS, 4]}


def test_plain_columns_that_other_tools_add_are_kept(trace_file: Path) -> None:
    table = pq.read_table(trace_file).append_column("reward", pa.array(np.arange(50, dtype=np.float32)))
    rewrite(trace_file, table=table)
    assert load_trace(trace_file).extra["reward"].tolist() == list(range(50))


def test_header_and_single_columns_can_be_read_alone(trace_file: Path) -> None:
    meta, layouts, rows = read_header(trace_file)
    assert rows == 50 and meta == random_trace().meta and layouts["experts"].shape == (LAYERS, 4)
    _, columns = read_columns(trace_file, ["step"])
    np.testing.assert_array_equal(columns["step"], random_trace().step)


def test_content_hash_depends_on_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(500)
    write_trace(tmp_path / "one.parquet", trace)
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 5000)
    write_trace(tmp_path / "two.parquet", trace)
    assert pq.read_metadata(tmp_path / "two.parquet").num_row_groups > 10
    assert load_trace(tmp_path / "one.parquet").content_sha256 == load_trace(tmp_path / "two.parquet").content_sha256
    other = random_trace(500)
    other.experts[-1, -1] = other.experts[-1, -1, ::-1].copy()
    assert other.content_sha256 != trace.content_sha256
    licence = dataclasses.replace(trace, meta=dataclasses.replace(trace.meta, licence="other"))
    assert licence.content_sha256 != trace.content_sha256


# The memory-mapped copy


def test_mapped_copy_is_made_once_and_not_checked_again(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert_same(load_trace(trace_file, mmap=True), random_trace())
    assert len(list((cache_folder() / "traces").iterdir())) == 1
    monkeypatch.setattr("moeflow.traces.reader._decode", None)  # a second decoding would fail
    again = load_trace(trace_file, mmap=True)
    assert_same(again, random_trace())
    again.experts[0] = 0  # copy on write: neither the copy nor other readers change
    assert_same(load_trace(trace_file, mmap=True), random_trace())


def test_damaged_mapped_copy_is_replaced(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_trace(trace_file, mmap=True)
    copy = next((cache_folder() / "traces").iterdir())
    for content in (b"", copy.read_bytes()[:1000]):
        copy.write_bytes(content)
        assert_same(load_trace(trace_file, mmap=True), random_trace())


def test_mapped_reading_refuses_what_plain_reading_refuses(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trace_file.write_bytes(trace_file.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        load_trace(trace_file, mmap=True)
    with pytest.raises(InputError, match="no such file"):
        load_trace(tmp_path / "none", mmap=True)
    assert not cache_folder().exists()


# Damage


def test_every_truncation_is_refused(trace_file: Path) -> None:
    whole = trace_file.read_bytes()
    for size in {*range(0, len(whole), max(1, len(whole) // 150)), 1, 4, 8, 11, 12, len(whole) - 1}:
        trace_file.write_bytes(whole[:size])
        refused(trace_file)


def test_truncation_that_leaves_an_end_mark_is_refused(trace_file: Path) -> None:
    whole = trace_file.read_bytes()
    for cut in (100, 1000, len(whole) // 2):
        trace_file.write_bytes(whole[: -8 - cut] + whole[-8:])
        refused(trace_file)


@settings(max_examples=200)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_flipped_bytes_never_give_wrong_rows(tmp_path_factory: pytest.TempPathFactory, where: float, mask: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.parquet"
    trace = random_trace()
    write_trace(path, trace)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= mask
    path.write_bytes(data)
    try:
        loaded = load_trace(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    assert first_fault(loaded.columns, loaded.meta) is None


def test_flipped_data_is_caught_by_its_checksum(trace_file: Path) -> None:
    data = bytearray(trace_file.read_bytes())
    chunk = pq.read_metadata(trace_file).row_group(0).column(7)
    assert chunk.path_in_schema == "experts"
    data[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 1
    trace_file.write_bytes(data)
    assert "damaged" in refused(trace_file)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"plain text, not Parquet", "is not Parquet"), (b"PAR1", "truncated")]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    assert message in refused(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.parquet")
    assert "cannot be read" in refused(tmp_path)


def test_parquet_without_our_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"step": [1, 2]}), path)
    assert "without the metadata key `moeflow`" in refused(path)


# Wrong metadata and geometry


def change(key: str, value: Any) -> Any:
    def apply(document: dict[str, Any]) -> dict[str, Any]:
        *parents, last = key.split(".")
        at = document
        for parent in parents:
            at = at[parent]
        if value is KeyError:
            del at[last]
        else:
            at[last] = value
        return document

    return apply


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format version 2, but this moeflow reads version 1; install a newer moeflow"),
        ("format", "1", "cannot be understood"),
        ("format", KeyError, "cannot be understood (no 'format')"),
        ("model", KeyError, "no 'model'"),
        ("model.top_k", 99, "top_k must lie in"),
        ("model.colour", "red", "colour"),
        ("requests", [{"id": 1}, {"id": 1}], "two requests have the same id"),
        ("lookahead_distances", [3, 1], "must ascend"),
        ("lookahead_distances", [1], "column lookahead has shape [4, 2, 5] per row, but must be [L+1=4, D=1"),
        ("model.top_k", 3, "column experts has shape [3, 4] per row, but must be [L=3, K=3]"),
        ("model.moe_layers", [1, 2], "column experts has shape [3, 4] per row, but must be [L=2, K=4]"),
        ("model.experts", 300, "column experts holds uint8, but must hold uint16 for 300 experts"),
        ("model.experts", 70000, "column experts cannot hold ids of 70000 experts"),
        ("columns.weights.shape", [12], "column weights has shape [12] per row"),
        ("columns.weights.dtype", "float32", "column weights holds float32, but must hold float16"),
        ("columns.weights.dtype", "object", "dtype is unknown"),
        ("columns.pages.shape", [7], "column pages is stored as fixed_size_binary[12], but declared as"),
        ("columns.probs", KeyError, "column probs is stored as"),
        ("columns.experts", KeyError, "column experts is missing"),
        ("columns.ghost", {"dtype": "int8", "shape": []}, "column ghost is declared but not stored"),
        ("columns.candidates", KeyError, "column candidate_logits needs the column candidates"),
    ],
)
def test_metadata_that_contradicts_the_file_is_refused(trace_file: Path, key: str, value: Any, message: str) -> None:
    rewrite(trace_file, change(key, value)(document_of(trace_file)))
    assert message in refused(trace_file)


def test_unreadable_metadata_is_refused(trace_file: Path) -> None:
    for text in (b"{", b"[]", b'{"format": NaN}', b"null", b"\xff\xfe", b"[" * 100_000):
        rewrite(trace_file, text)
        assert "metadata cannot be understood" in refused(trace_file)


def test_columns_of_another_type_are_refused(trace_file: Path) -> None:
    table = pq.read_table(trace_file)
    index = table.schema.get_field_index("token")
    rewrite(trace_file, table=table.set_column(index, "token", table["token"].cast(pa.int64())))
    assert "column token is stored as int64, but declared as int32" in refused(trace_file)
    rewrite(trace_file, table=table.drop_columns(["token"]))
    assert "column token" in refused(trace_file)
    rewrite(trace_file, table=table.append_column("note", pa.array(["x"] * 50)))
    assert "column note is stored as string, but the metadata does not declare it" in refused(trace_file)


def test_nulls_are_refused(trace_file: Path) -> None:
    table = pq.read_table(trace_file)
    holes = pa.array([None, *range(49)], pa.int32())
    rewrite(trace_file, table=table.set_column(3, pa.field("token", pa.int32()), holes))
    assert "nulls" in refused(trace_file)


def test_a_trace_without_rows_is_refused(trace_file: Path) -> None:
    rewrite(trace_file, table=pq.read_table(trace_file).slice(0, 0))
    assert "no rows" in refused(trace_file)


# Wrong rows: the same rules when writing and when reading

ROW = 30


def set_ids(column: str, ids: list[int]) -> Any:
    return lambda columns: columns[column].__setitem__((ROW, 1), ids)


def set_value(column: str, value: Any, *place: int) -> Any:
    return lambda columns: columns[column].__setitem__((ROW, *place), value)


FAULTS = {
    "expert out of range": (set_ids("experts", [1, 2, 3, 16]), "experts", "names expert 16, but the model has"),
    "expert twice": (set_ids("experts", [1, 2, 3, 1]), "experts", "names an expert twice"),
    "expert after an absent one": (set_ids("experts", [1, 255, 3, 4]), "experts", "has an expert after an absent one"),
    "candidate twice": (set_ids("candidates", [0, 1, 2, 3, 4, 5, 6, 0]), "candidates", "names an expert twice"),
    "lookahead out of range": (set_value("lookahead", 200, 0, 0, 2), "lookahead", "names expert 200"),
    "lookahead past the end": (
        set_value("lookahead", range(5), LAYERS, 0),
        "lookahead",
        "distance 1 names experts past",
    ),
    "weight not a number": (set_value("weights", np.nan, 0, 0), "weights", "value at [0, 0] is not a finite number"),
    "logit infinite": (
        set_value("candidate_logits", np.inf, 2, 1),
        "candidate_logits",
        "value at [2, 1] is not a finite",
    ),
    "probability above one": (set_value("probs", 1.01, 2, 1), "probs", "outside 0 to 1"),
    "probability negative": (set_value("probs", -0.01, 2, 1), "probs", "outside 0 to 1"),
    "embedding not a number": (set_value("embedding", np.nan, 3), "embedding", "value at [3] is not a finite number"),
    "phase": (set_value("phase", 2), "phase", "2 is out of range (0 to 1)"),
    "flags": (set_value("flags", 16), "flags", "16 is out of range (0 to 15)"),
    "position": (set_value("position", -1), "position", "-1 is out of range (at least 0)"),
    "token": (set_value("token", -2), "token", "-2 is out of range (at least -1)"),
    "attempt": (set_value("attempt", -1), "attempt", "-1 is out of range"),
    "request": (set_value("request", -5), "request", "-5 is out of range"),
    "time backwards": (set_value("step_ns", [9, 8]), "step_ns", "start and end [9, 8] are out of order"),
    "step falls": (lambda c: c["step"].__setitem__(slice(ROW), 40), "step", "comes after 40, but steps never decrease"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_refused_when_written_and_when_read(tmp_path: Path, fault: str) -> None:
    damage, column, message = FAULTS[fault]
    trace = random_trace()
    trace.experts[ROW] = [0, 1, 2, 3]
    path = tmp_path / "t.parquet"
    write_trace(path, trace)
    table = pq.read_table(path)
    damage(trace.columns)
    for name, array in trace.columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), writer_module.to_arrow(array))
    rewrite(path, table=table)
    assert f"column {column}, row {ROW}: " in refused(path) and message in refused(path)
    with pytest.raises(InputError, match=f"column {column}, row {ROW}: "):
        write_trace(tmp_path / "new.parquet", trace)
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def test_numbers_beside_absent_experts_are_not_looked_at(tmp_path: Path) -> None:
    trace = random_trace()
    trace.experts[ROW, 1, 2:] = 255
    trace.weights[ROW, 1, 2:] = np.nan  # type: ignore[index]
    write_trace(tmp_path / "t.parquet", trace)
    assert np.isnan(load_trace(tmp_path / "t.parquet").weights[ROW, 1, 2:]).all()  # type: ignore[index]


def test_the_first_of_several_faults_is_named_across_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = random_trace(2000, optional=False)
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 5000)
    monkeypatch.setattr(writer_module, "first_fault", lambda *_, **__: None)
    trace.phase[1900], trace.experts[700, 2, 0], trace.step[701:] = 7, 99, 0
    write_trace(tmp_path / "t.parquet", trace)
    assert "column experts, row 700" in refused(tmp_path / "t.parquet")
    monkeypatch.setattr("moeflow.traces.check._BLOCK_BYTES", 100)  # faults in other blocks, and at their borders
    trace.experts[700, 2, 0] = 0
    trace.experts[700, 2, 1:] = [1, 2, 3]
    write_trace(tmp_path / "t.parquet", trace)
    assert "column step, row 701" in refused(tmp_path / "t.parquet")


# The streaming writer


def blocks(count: int, rows: int = 100) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {
            "step": np.arange(index * rows, (index + 1) * rows),
            "request": np.zeros(rows, int),
            "position": np.arange(rows),
            "phase": np.ones(rows, int),
            "experts": choices(rng, 16, rows, LAYERS, 4).astype(np.int64),
        }
        for index in range(count)
    ]


def test_rows_leave_memory_while_the_recording_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 5000)
    with TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer:
        sizes = []
        for block in blocks(40):
            writer.append(**block)
            assert writer._pending_rows * 32 <= 5000
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        assert not (tmp_path / "t.parquet").exists()
    assert sizes == sorted(sizes) and sizes[-1] > 20 * sizes[2] / 3
    loaded = load_trace(tmp_path / "t.parquet")
    assert loaded.rows == 4000 and (loaded.token == -1).all() and not loaded.attempt.any() and not loaded.flags.any()
    np.testing.assert_array_equal(loaded.experts, np.concatenate([block["experts"] for block in blocks(40)]))


def test_the_caller_may_reuse_its_buffers(tmp_path: Path) -> None:
    block = blocks(1)[0]
    block["experts"] = block["experts"].astype(np.uint8)
    with TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer:
        writer.append(**block)
        expected = block["experts"].copy()
        block["experts"][:] = 77
    np.testing.assert_array_equal(load_trace(tmp_path / "t.parquet").experts, expected)


def test_requests_and_recording_facts_may_come_at_the_end(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.parquet", TraceMeta(spec(), recorded={"device": "cpu"})) as writer:
        writer.append(**blocks(1)[0])
        writer.finish(requests=[Request(0, output_tokens=100)], recorded={"device": "cpu", "seconds": 2.5})
    meta = load_trace(tmp_path / "t.parquet").meta
    assert meta.requests == (Request(0, output_tokens=100),) and meta.recorded["seconds"] == 2.5


def test_an_exception_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1000)
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer:
        writer.append(**blocks(1)[0])
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_until_the_new_one_is_complete(trace_file: Path) -> None:
    before = trace_file.read_bytes()
    with pytest.raises(InputError), TraceWriter(trace_file, TraceMeta(spec())) as writer:
        writer.append(**{**blocks(1)[0], "phase": np.full(100, 9)})
    assert trace_file.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": np.zeros((100, LAYERS, 5), np.uint8)}, "must be [L=3, K=4]"),
        ({"experts": np.zeros((99, LAYERS, 4), np.uint8)}, "column experts has shape (99, 3, 4), but step has 100"),
        ({"experts": np.full((100, LAYERS, 4), -1)}, "column experts has int64 values that uint8 does not hold"),
        ({"weights": np.zeros((100, LAYERS, 4), int)}, "column weights has int64 values"),
        ({"experts": None}, "column experts is missing"),
        ({"lookahead_weights": np.zeros((100, 4, 0, 4))}, "column lookahead_weights"),
        ({"note": np.array(["x"] * 100)}, "column note holds"),
        ({"phase": 1}, "column phase has shape ()"),
    ],
)
def test_misshapen_blocks_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught, TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer:
        writer.append(**{**blocks(1)[0], **wrong})
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_blocks_must_have_the_same_columns(tmp_path: Path) -> None:
    one, two = blocks(2)
    with (
        pytest.raises(InputError, match="weights is in some blocks only"),
        TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer,
    ):
        writer.append(**one)
        writer.append(**two, weights=np.zeros((100, LAYERS, 4)))


def test_steps_may_not_fall_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 100 * 32)
    one, two = blocks(2)
    with (
        pytest.raises(InputError, match="column step, row 100: 0 comes after 199"),
        TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer,
    ):
        writer.append(**two)
        writer.append(**one)


def test_weights_too_large_for_float16_are_refused_by_row(tmp_path: Path) -> None:
    weights = np.zeros((100, LAYERS, 4), np.float32)
    weights[7, 0, 0] = 1e6
    with (
        pytest.raises(InputError, match="column weights, row 7"),
        TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())) as writer,
    ):
        writer.append(**blocks(1)[0], weights=weights)


def test_writing_nothing_or_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no rows"), TraceWriter(tmp_path / "t.parquet", TraceMeta(spec())):
        pass
    with pytest.raises(InputError, match="folder does not exist"):
        TraceWriter(tmp_path / "none" / "t.parquet", TraceMeta(spec()))
    with pytest.raises(InputError, match="is a folder"):
        TraceWriter(tmp_path, TraceMeta(spec()))
    assert not list(tmp_path.iterdir())
