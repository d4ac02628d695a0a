"""Where the experts of one layer's call are, while it is computed.

Most sit in slots. When more are needed than slots are free, the rest is streamed: copied into a few scratch slots, one
matrix at a time, computed with and dropped. Which is which never changes what is computed, only when it can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .host_experts import HostExperts
from .layout import RowLayout
from .transfers import Transfers

MOST_GROUPS = 1000  # slots that one grouped launch may span: CUDA's grouped kernel takes fewer than 1024


@dataclass
class Serving:
    """Experts of `layer`: in slots (`slot_of` [E], -1 elsewhere) and `streamed` through the `scratch` slots."""

    layer: int
    layout: RowLayout
    weights: dict[str, Tensor]  # [slots, *shape] of every field
    transfers: Transfers
    ids: NDArray[np.int64]  # [T, K], on the host
    slot_of: NDArray[np.int64]
    ready: list[int]  # experts in slots whose bytes have landed
    arriving: list[int]  # experts in slots whose bytes are on their way
    streamed: list[int]
    kinds: dict[int, str]  # of streamed experts: stream, or padding
    scratch: range
    split: bool  # compute with what is ready while the rest arrives
    host: HostExperts | None = None  # experts that the host computes
    waited: set[int] = field(default_factory=set)
    through: dict[int, tuple[int, set[str]]] = field(default_factory=dict)  # scratch slot -> expert, what it has of it
    rounds: int = 0  # times that all experts were gone through, once per matrix
    waves_served: int = 0

    @property
    def distinct(self) -> int:
        """Different experts of the call."""
        return len(self.ready) + len(self.arriving) + len(self.streamed)

    @property
    def whole(self) -> dict[int, int] | None:
        """Expert -> slot, where one wave serves everything."""
        if self.streamed or (self.split and self.arriving):
            return None
        experts = self.ready + self.arriving
        slots = self.slot_of[experts].tolist()
        if min(slots) // MOST_GROUPS != max(slots) // MOST_GROUPS:
            return None
        self.arrive(experts)
        self.rounds, self.waves_served = 1, 1
        return dict(zip(experts, slots, strict=True))

    def lookup(self, slots: dict[int, int]) -> Tensor:
        """[E] on the device: the slot of each of these experts."""
        table = self.slot_of  # says the same of all that are not streamed
        if self.streamed:
            table = table.copy()
            table[list(slots)] = list(slots.values())
        return torch.from_numpy(table).to(self.transfers.rows.device)

    def waves(self, names: tuple[str, ...]) -> Iterator[dict[int, int]]:
        """Expert -> slot, all of a wave with these fields in place until the next wave is asked for."""
        self.rounds += 1
        for experts in [self.ready, self.arriving] if self.split else [self.ready + self.arriving]:
            self.arrive(experts)
            for wave in self._windows(experts):
                self.waves_served += 1
                yield wave
        for first in range(0, len(self.streamed), len(self.scratch)):
            experts = self.streamed[first : first + len(self.scratch)]
            self.waves_served += 1
            yield {expert: self.pass_through(expert, names, at) for at, expert in enumerate(experts)}

    def slot_with(self, expert: int, name: str) -> int:
        """The slot that has `name` of one expert, for what is computed from now on."""
        if self.slot_of[expert] >= 0:
            self.arrive([expert])
            return int(self.slot_of[expert])
        return self.pass_through(expert, (name,), self.streamed.index(expert) % len(self.scratch))

    def arrive(self, experts: list[int]) -> None:
        """What is computed from now on finds these experts in their slots."""
        fresh = [expert for expert in experts if expert not in self.waited]
        if fresh:
            self.transfers.wait(self.slot_of[fresh].tolist(), self.layer)
            self.waited.update(fresh)

    def pass_through(self, expert: int, names: tuple[str, ...], at: int) -> int:
        """Copy fields of a streamed expert into scratch slot number `at`, unless they are there."""
        slot = self.scratch[at]
        holder, has = self.through.get(slot, (-1, set()))
        if holder != expert:
            if holder >= 0:
                self.transfers.used([slot])
            has = set()
            self.through[slot] = expert, has
        for name in names:
            if name not in has:
                key = self.layer * len(self.slot_of) + expert
                self.transfers.part(key, slot, self.layout[name], self.kinds[expert], self.layer)
                has.add(name)
        return slot

    def done(self) -> None:
        """The call has been computed: its slots may be written again afterwards."""
        slots = self.slot_of[self.ready + self.arriving].tolist()
        self.transfers.used([*slots, *self.through])

    def _windows(self, experts: list[int]) -> Iterator[dict[int, int]]:
        """Split where the slots lie further apart than one grouped launch reaches."""
        by_window: dict[int, dict[int, int]] = {}
        for expert in experts:
            slot = int(self.slot_of[expert])
            by_window.setdefault(slot // MOST_GROUPS, {})[expert] = slot
        for window in sorted(by_window):
            yield by_window[window]
