"""What other programs did with the host's cores while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = 0.1  # of all cores, from which on a measurement is not the machine's own. Chosen here


class Others:
    """From its making on."""

    def __init__(self) -> None:
        self._began = self._now()

    def share(self) -> float:
        """Of the time of all cores, what others took; 0 where the system does not say."""
        (began, busy_before, own_before), (now, busy, own) = self._began, self._now()
        taken = (busy - busy_before) - (own - own_before)
        return max(0.0, taken / max(now - began, 1e-9) / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: the clock's, all cores' busy ones, this process's."""
        times = os.times()
        return time.monotonic(), _busy_s(), times.user + times.system


def _busy_s() -> float:
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft, stolen = map(int, words)
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
