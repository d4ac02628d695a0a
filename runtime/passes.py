"""Forward passes as the model's caller makes them: which rows are live tokens, and of which requests.

The rules are the recorder's (traces/recorder.py, traces/recorded_rows.py): each row of a batch is one request, a pass
without cached keys starts new ones, padding and sequences that have ended are computed but not counted.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..traces.recorder import batch_shape, cached_tokens, own_stop_tokens
from ..traces.trace import DECODE, PREFILL


@dataclass(frozen=True)
class Pass:
    """One forward pass over B * S rows, n of which are live tokens."""

    shape: tuple[int, int]  # B, S
    phase: int
    live: NDArray[np.bool_]  # [B * S]
    tokens: NDArray[np.int32]  # [n], -1 where the model was given none
    requests: NDArray[np.int32]  # [n]
    positions: NDArray[np.int32]  # [n]

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def all_live(self) -> bool:
        return len(self.tokens) == self.rows


class Passes:
    """Turns what `model.forward` is called with into passes. `masks_unread` counts masks that hide the padding."""

    def __init__(self, model: Any) -> None:
        self.stop_tokens = own_stop_tokens(model)
        self.masks_unread = 0
        self._names = list(inspect.signature(model.forward).parameters)
        self._requests: NDArray[np.int64] = np.zeros(0, np.int64)  # [B] of the running batch
        self._position: NDArray[np.int64] = np.zeros(0, np.int64)  # [B] of the next token
        self._finished: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._next_request = 0

    def hook(self, began: Callable[[Pass], None]) -> Callable[..., None]:
        """A forward pre-hook for the model that hands each pass to `began`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            began(self.begin({**dict(zip(self._names, args, strict=False)), **kwargs}))

        return before

    def begin(self, given: Mapping[str, Any]) -> Pass:
        """The pass that a call with these arguments makes. Raises InputError without input_ids or inputs_embeds."""
        ids = given.get("input_ids")
        batch, length = batch_shape(ids if ids is not None else given.get("inputs_embeds"))
        first = self._meet(batch, cached_tokens(given.get("past_key_values")))
        phase = PREFILL if first or length > 1 else DECODE
        tokens = np.full((batch, length), -1, np.int32)
        if ids is not None:
            tokens = ids.detach().cpu().numpy().astype(np.int32)
        live = self._unpadded(given.get("attention_mask"), phase, batch, length)
        live &= ~self._ended(tokens, phase)[:, None]
        counts = live.sum(1)
        positions = self._position[:, None] + np.cumsum(live, 1) - 1
        self._position = self._position + counts
        requests = np.repeat(self._requests, counts).astype(np.int32)
        return Pass((batch, length), phase, live.reshape(-1), tokens[live], requests, positions[live].astype(np.int32))

    def _meet(self, batch: int, cached: int) -> bool:
        """Whether these sequences are new: without cached keys they are."""
        if cached and len(self._requests) == batch:
            return False
        self._requests = np.arange(self._next_request, self._next_request + batch)
        self._next_request += batch
        self._position, self._finished = np.full(batch, cached), np.zeros(batch, np.bool_)
        return True

    def _unpadded(self, mask: Any, phase: int, batch: int, length: int) -> NDArray[np.bool_]:
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return np.asarray(mask.detach()[:, -length:].cpu().numpy() != 0)
        if mask is not None and phase == PREFILL and batch > 1:
            if not self.masks_unread:
                warnings.warn(
                    "moeflow: padding cannot be told from text and is counted: pass a two-dimensional attention_mask",
                    stacklevel=2,
                )
            self.masks_unread += 1
        return np.ones((batch, length), np.bool_)

    def _ended(self, tokens: NDArray[np.int32], phase: int) -> NDArray[np.bool_]:
        """[B]: sequences that ended before this pass. A stop token that is fed back ended its sequence."""
        if phase == PREFILL:
            self._finished = np.zeros(len(tokens), np.bool_)
        else:
            for token in self.stop_tokens:
                self._finished = self._finished | (tokens == token).any(1)
        return self._finished
