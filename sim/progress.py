"""How far long work has come: on stderr, so that stdout stays the answer."""

from __future__ import annotations

import sys


class Progress:
    """A bar on a terminal, a line per tenth elsewhere."""

    def __init__(self, doing: str = "simulating", done: str = "simulated", unit: str = "tokens") -> None:
        self._doing, self._done, self._unit = doing, done, unit

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = None
        self._tenths = 0
        if console.is_terminal:
            columns = (TextColumn(self._doing), BarColumn(), MofNCompleteColumn(), TextColumn(self._unit))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._unit, total=None)
        return self

    def update(self, done: int, total: int) -> None:
        """`done` of `total` units are complete."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done * 10 // total > self._tenths:
            self._tenths = done * 10 // total
            print(f"{self._done} {done} of {total} {self._unit}", file=sys.stderr)

    def notice(self, sentence: str) -> None:
        """Say why nothing moves yet."""
        if self._bar is not None:
            self._bar.console.print(sentence)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
