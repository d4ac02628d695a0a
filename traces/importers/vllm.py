"""vLLM's routed experts (`--enable-return-routed-experts`): integers [tokens, layers, top-k] for one request.

An `.npy`, an `.npz` with one array per request, or a folder of `.npy` files. The arrays hold ids only: no token ids,
no weights, no batching, and no prompt length unless an `.npz` has `prompt_tokens` [requests] beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..trace import Request
from .npz import load_arrays
from .recording import Recording, phases

_PROMPTS = "prompt_tokens"


def read(source: Path) -> Recording:
    """Requests in the order of the archive, or of the file names. Raises InputError."""
    arrays = _arrays(source)
    prompts = arrays.pop(_PROMPTS, None)
    if prompts is not None and prompts.shape != (len(arrays),):
        raise InputError(f"{source}: {_PROMPTS} has shape {prompts.shape} for {len(arrays)} requests; correct it")
    shapes = {array.shape[1:] for array in arrays.values()}
    bad = next((name for name, a in arrays.items() if a.ndim != 3 or a.dtype.kind not in "iu"), None)
    if bad is not None or len(shapes) != 1:
        what = "no array is there" if not arrays else f"array {bad or next(iter(arrays))!r} has another shape or type"
        raise InputError(f"{source}: {what}; expected integers [tokens, layers, top-k], one array per request")
    lengths = [len(array) for array in arrays.values()]
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    prompt_tokens = [None] * len(lengths) if prompts is None else [int(length) for length in prompts]
    phase = [phases(np.arange(n), p or 0) for n, p in zip(lengths, prompt_tokens, strict=True)]
    assumed = ["requests ran one after the other, batch 1"]
    if prompts is None:
        assumed.append("every token is a decode step: the arrays do not say where the prompt ends")
    return Recording(
        experts=np.concatenate(list(arrays.values())).astype(np.int32),
        request=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        position=position,
        phase=np.concatenate(phase),
        requests=tuple(Request(i, prompt_tokens=p) for i, p in enumerate(prompt_tokens)),
        recorded={"by": "vLLM routed experts", "request_names": list(arrays), "assumed": assumed},
    )


def _arrays(source: Path) -> dict[str, NDArray[Any]]:
    if not source.is_dir():
        return load_arrays(source)
    return {file.stem: load_arrays(file)[""] for file in sorted(source.glob("*.npy"))}
