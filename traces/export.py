"""Writes a trace in formats that other programs read. Each carries less than a trace: see docs/trace-format.md."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .importers.npz import FORMAT
from .trace import Trace

_PHASES = ("prefill", "decode")


def export_trace(trace: Trace, target: str | Path) -> None:
    """Write `.jsonl` (a record per token and layer) or `.npz` with its `.json`, by the target's ending.

    Raises InputError for another ending or a place that cannot be written; then nothing is left there.
    """
    target = Path(target)
    if target.suffix not in _WRITERS:
        raise InputError(f"{target}: cannot export to {target.suffix or 'no ending'!r}; use {' or '.join(_WRITERS)}")
    _WRITERS[target.suffix](trace, target)


def write_jsonl(trace: Trace, target: Path) -> None:
    """Weights are written with the five significant digits that tell every float16 apart."""
    with _replacing(target) as file:
        for row in range(trace.rows):
            scalars = {
                "step": int(trace.step[row]),
                "request": int(trace.request[row]),
                "position": int(trace.position[row]),
                "token": int(trace.token[row]),
                "phase": _PHASES[trace.phase[row]],
                "attempt": int(trace.attempt[row]),
                "flags": int(trace.flags[row]),
            }
            for index, layer in enumerate(trace.meta.model.moe_layers):
                record = {**scalars, "layer": layer, **_choice(trace, row, index)}
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")


def write_npz(trace: Trace, target: Path) -> None:
    """The layout that `trace import` reads: arrays, and origin, licence and sequences in a `.json` beside them."""
    absent = trace.experts == trace.absent
    arrays: dict[str, NDArray[Any]] = {
        "expert_ids": trace.experts,
        "seq_id": trace.request,
        "pos": trace.position,
        "phase": trace.phase.astype(np.uint8),
    }
    if trace.weights is not None:
        arrays["gate_weights"] = np.where(absent, np.float16(np.nan), trace.weights)
    with _replacing(target) as file, _replacing(target.with_suffix(".json")) as sidecar:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        sidecar.write(json.dumps(_sidecar(trace), indent=1).encode())


def _choice(trace: Trace, row: int, layer: int) -> dict[str, Any]:
    ids = trace.experts[row, layer]
    present = ids != trace.absent
    choice: dict[str, Any] = {"experts": ids[present].tolist()}
    if trace.weights is not None:
        choice["weights"] = [float(f"{weight:.5g}") for weight in trace.weights[row, layer][present].tolist()]
    return choice


def _sidecar(trace: Trace) -> dict[str, Any]:
    model = trace.meta.model
    names = {"id": "seq_id", "prompt_tokens": "prompt_len", "domain": "dataset"}
    sequences = [
        {names[key]: value for key, value in vars(request).items() if key in names and value is not None}
        | ({"tokens": request.output_tokens - 1} if request.output_tokens is not None else {})
        | ({"finished": request.stop_reason != "length"} if request.stop_reason is not None else {})
        for request in trace.meta.requests
    ]
    return {
        **trace.meta.recorded,
        "format": FORMAT,
        "absent_marker": trace.absent,
        "tokens": trace.rows,
        "num_layers_in_trace": len(model.moe_layers),
        "top_k": model.top_k,
        "num_sequences": len(np.unique(trace.request)),
        "model": model.name,
        "num_experts": model.experts,
        "moe_layer_indices": list(model.moe_layers),
        "license": trace.meta.licence,
        "sequences": sequences,
    }


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears as `target` when the block ends well, and vanishes otherwise."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


_WRITERS: dict[str, Callable[[Trace, Path], None]] = {".jsonl": write_jsonl, ".npz": write_npz}
