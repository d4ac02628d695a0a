"""Brings in routing that other programs recorded. One file per format; what each lacks is in docs/trace-format.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ..models import list_model_specs, load_model_spec
from ..writer import TraceWriter
from . import npz, records, sglang, vllm
from .recording import Recording

if TYPE_CHECKING:
    from ..model_spec import ModelSpec

FORMATS: dict[str, Callable[[Path], Recording]] = {
    "npz": npz.read,
    "jsonl": records.read_jsonl,
    "vllm": vllm.read,
    "sglang": sglang.read,
    "llamacpp": records.read_csv,
}
_BLOCK = 1 << 16  # rows


def import_trace(source: str | Path, target: str | Path, *, form: str = "auto", model: str | None = None) -> int:
    """Convert a recording in another format into a trace; the number of rows.

    `form` is `auto` or a key of FORMATS. `model` names a model spec or a `config.json`; where the recording itself
    names a known model it may be missing. Raises InputError, and then writes nothing.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise InputError(f"{source}: no such file; name a recording that exists")
    form = _guessed_format(source) if form == "auto" else form
    if form not in FORMATS:
        raise InputError(f"{source}: {form!r} is not a known format; choose one of {', '.join(FORMATS)}")
    spec = load_model_spec(model) if model else None
    recording = FORMATS[form](source)
    spec = spec or _guessed_model(source, recording.model)
    columns = recording.columns(source, spec)
    recorded = {"imported_from": source.name, "format": form, **recording.recorded}
    with TraceWriter(target, recording.meta(spec, recorded)) as writer:
        for start in range(0, len(recording.experts), _BLOCK):
            writer.append(**{name: array[start : start + _BLOCK] for name, array in columns.items()})
    return writer.rows


def _guessed_format(source: Path) -> str:
    if source.is_dir():
        return "vllm"
    by_ending = {".jsonl": "jsonl", ".npy": "vllm", ".pt": "sglang", ".csv": "llamacpp"}
    if source.suffix == ".npz":
        return "npz" if npz.recognises(source) else "vllm"
    if source.suffix not in by_ending:
        raise InputError(
            f"{source}: the ending {source.suffix!r} names no known format; say which with --format "
            f"({', '.join(FORMATS)})"
        )
    return by_ending[source.suffix]


def _guessed_model(source: Path, name: str) -> ModelSpec:
    """The longest known model name that occurs in what the recording calls its model."""
    known = [spec for spec in list_model_specs() if spec in name.lower()]
    if not known:
        said = f"the model {name!r}, which is not a known one" if name else "no model"
        raise InputError(f"{source}: the recording names {said}; give --model NAME or a config.json")
    return load_model_spec(max(known, key=len))
