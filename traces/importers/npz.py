"""`.npz` with a `.json` beside it: expert_ids [T, L, K], seq_id, pos, phase [T], optionally gate_weights [T, L, K].

Rows are sequence-major. The sidecar tells model, origin, licence and what is known about each sequence.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..trace import Request
from .recording import Recording

FORMAT = "moe-routing-trace/1"
_ELSEWHERE = {"format", "arrays", "absent_marker", "moe_layer_indices", "sequences", "license"}  # or follow from
_ELSEWHERE |= {"tokens", "num_layers_in_trace", "top_k", "num_sequences", "num_experts"}  # what a trace holds


def recognises(source: Path) -> bool:
    """Whether this is an archive with `expert_ids`, not one of vLLM arrays."""
    return "expert_ids" in load_arrays(source)


def load_arrays(source: Path) -> dict[str, NDArray[Any]]:
    """Every array of an `.npz`, or of an `.npy` under the name `""`. Raises InputError."""
    try:
        loaded = np.load(source, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise InputError(f"{source}: not readable as NumPy arrays ({error}); copy or export it again") from None


def read(source: Path) -> Recording:
    """Raises InputError for a missing or misshapen array."""
    arrays = load_arrays(source)
    sidecar = _sidecar(source.with_suffix(".json"))
    ids = _array(source, arrays, "expert_ids", 3)
    rows = {name: _array(source, arrays, name, 1, len(ids)) for name in ("seq_id", "pos", "phase")}
    weights = arrays.get("gate_weights")
    if weights is not None and weights.shape != ids.shape:
        raise InputError(f"{source}: gate_weights has shape {weights.shape}, expert_ids {ids.shape}; export it again")
    try:
        return Recording(
            experts=np.where(ids == sidecar.get("absent_marker", np.iinfo(ids.dtype).max), -1, ids.astype(np.int64)),
            request=rows["seq_id"],
            position=rows["pos"],
            phase=rows["phase"],
            weights=weights,
            layers=tuple(map(int, sidecar["moe_layer_indices"])) if "moe_layer_indices" in sidecar else None,
            model=str(sidecar.get("model", "")),
            experts_named=sidecar.get("num_experts"),
            requests=_requests(sidecar, rows["seq_id"]),
            recorded={key: value for key, value in sidecar.items() if key not in _ELSEWHERE},
            licence=str(sidecar.get("license", "")),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{source.with_suffix('.json')}: has an entry of another kind ({error}); correct it") from None


def _array(
    source: Path, arrays: dict[str, NDArray[Any]], name: str, dimensions: int, rows: int | None = None
) -> NDArray[Any]:
    if name not in arrays:
        raise InputError(f"{source}: the array {name} is missing; export it again")
    array = arrays[name]
    if array.ndim != dimensions or array.dtype.kind not in "iu" or rows not in (None, len(array)):
        raise InputError(f"{source}: the array {name} is {array.dtype} {array.shape}; export it again")
    return array


def _sidecar(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); correct it or move it away") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object; correct it or move it away")
    return values


def _requests(sidecar: dict[str, Any], sequence: NDArray[Any]) -> tuple[Request, ...]:
    """One record per sequence. The first generated token comes out of the prefill: n rows decode n + 1 tokens."""
    known = {one["seq_id"]: one for one in sidecar.get("sequences", ()) if "seq_id" in one}
    names = dict(enumerate(sidecar.get("workloads", ())))
    requests = []
    for id in np.unique(sequence).tolist():
        one = known.get(id, {})
        domain = "/".join(str(one[key]) for key in ("dataset", "category") if key in one) or names.get(id)
        finished = one.get("finished")
        requests.append(
            Request(
                id=id,
                prompt_tokens=one.get("prompt_len"),
                output_tokens=one["tokens"] + 1 if "tokens" in one else None,
                stop_reason=None if finished is None else "eos" if finished else "length",
                domain=domain,
            )
        )
    return tuple(requests)
