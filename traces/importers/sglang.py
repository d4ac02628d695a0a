"""SGLang's expert distribution dump in `per_token` mode: a `.pt` file of one rank, read with torch.

A record per forward pass: input_ids, positions, extend_seq_lens, forward_mode, topk_ids_of_layer [layers, tokens, 8].
It has physical expert ids (mapped back with the dump's last placement), no weights and no request ids: a token
continues the longest-waiting sequence that has reached its position.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..trace import DECODE, PREFILL
from .recording import Recording, attempts

_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4  # SGLang's ForwardMode


def read(source: Path) -> Recording:
    """Raises InputError for a dump of another mode, or without torch."""
    dump = _load(source)
    records = dump.get("records") if isinstance(dump, dict) else None
    if not records or "topk_ids_of_layer" not in records[0]:
        raise InputError(f"{source}: no per-token records; dump with --expert-distribution-recorder-mode per_token")
    placement = _integers(dump["last_physical_to_logical_map"]) if "last_physical_to_logical_map" in dump else None
    sequences = _Sequences()
    passes = []
    for index, record in enumerate(sorted(records, key=lambda one: int(one["forward_pass_id"]))):
        try:
            passes.append(_rows(record, index, placement, sequences))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{source}: record {index} is not readable ({error!r}); dump it again") from None
    rows = {name: np.concatenate([one[name] for one in passes]) for name in passes[0]}
    ids = rows.pop("experts")
    used = int((ids >= 0).any(axis=(0, 1)).sum())  # SGLang pads every top-k to 8
    assumed = [
        "request ids are reconstructed from positions",
        "expert placement did not change before the dump",
        "in mixed passes a sequence of one token is decoding",
    ]
    return Recording(
        experts=ids[:, :, :used],
        attempt=attempts(rows["request"], rows["position"]),
        recorded={"by": "SGLang expert distribution recorder, per_token", "assumed": assumed},
        step=rows["step"],
        request=rows["request"],
        position=rows["position"],
        token=rows["token"],
        phase=rows["phase"],
    )


def _load(source: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{source}: reading .pt needs torch; install moeflow[live]") from None
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the pickle or the archive made it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(f"{source}: not readable as a .pt file of plain values ({reason}); dump it again") from None


def _integers(values: Any) -> NDArray[np.int32]:
    return np.asarray(values, np.int32)


def _rows(
    record: dict[str, Any], step: int, placement: NDArray[np.int32] | None, sequences: _Sequences
) -> dict[str, NDArray[Any]]:
    """Trace columns of one forward pass."""
    position, mode = _integers(record["positions"]), int(record["forward_mode"])
    ids = _integers(record["topk_ids_of_layer"])
    if mode not in (_EXTEND, _DECODE, _MIXED, _IDLE):
        raise ValueError(f"forward mode {mode} is speculative decoding, which is not imported")
    if placement is not None:
        layer = np.arange(len(ids))[:, None, None]
        ids = np.where(ids < 0, -1, placement[layer, np.maximum(ids, 0)])
    lengths = [1] * len(position) if mode == _DECODE else [int(n) for n in record["extend_seq_lens"] or ()]
    if sum(lengths) != len(position) or ids.shape[1] != len(position):
        raise ValueError("token counts disagree")
    decoding = np.repeat([mode == _DECODE or (mode == _MIXED and n == 1) for n in lengths], lengths)
    return {
        "step": np.full(len(position), step, np.int32),
        "request": sequences.continued(position, lengths),
        "position": position,
        "token": _integers(record["input_ids"]),
        "phase": np.where(decoding, DECODE, PREFILL).astype(np.int8),
        "experts": ids.transpose(1, 0, 2),
    }


class _Sequences:
    """Which request a run of tokens belongs to, judged by the position at which it goes on."""

    def __init__(self) -> None:
        self.waiting: dict[int, deque[int]] = {}  # next position -> requests, longest waiting first
        self.count = 0

    def continued(self, position: NDArray[np.int32], lengths: list[int]) -> NDArray[np.int32]:
        """[tokens] request ids for consecutive runs of `lengths` tokens of one forward pass."""
        starts = np.cumsum([0, *lengths])[:-1]
        begins: list[int] = position[starts].tolist()
        requests = [self._at(begin) for begin in begins]
        for request, begin, length in zip(requests, begins, lengths, strict=True):
            self.waiting.setdefault(begin + length, deque()).append(request)
        return np.repeat(np.asarray(requests, np.int32), lengths)

    def _at(self, position: int) -> int:
        if position and self.waiting.get(position):
            return self.waiting[position].popleft()
        self.count += 1
        return self.count - 1
