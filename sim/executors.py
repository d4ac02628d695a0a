"""Where the cells of a sweep are computed: processes on this machine, or the workers of a Dask cluster.

Both yield cells as they finish, in any order, each with its figures. A cell whose worker dies is tried once more on
this machine, on a cluster as often as its scheduler allows; then it has `error` and `failed`, and the others go on.
An InputError out of the work means that no cell can be computed there, so it ends the sweep.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process

from ..errors import InputError
from .cell import Figures
from .grid import Cell

Work = Callable[[Cell], Figures]
Finished = Iterator[tuple[Cell, Figures]]
Execute = Callable[[Sequence[Cell], Work], Finished]

DIED = "the worker that computed it died (killed, or out of memory)"
CONNECT_S = 10  # for a scheduler to answer, and for a first worker; chosen here


def executor(name: str, jobs: int | None) -> Execute:
    """`local`, or `dask://HOST:PORT` of a scheduler. Raises InputError."""
    if name == "local":
        count = jobs or os.cpu_count() or 1
        return lambda cells, work: on_this_machine(cells, work, count)
    if not name.startswith("dask://") or not name.removeprefix("dask://"):
        raise InputError(f"--executor {name!r}: expected local or dask://HOST:PORT")
    if jobs is not None:
        raise InputError("--jobs counts processes of this machine; leave it out where a Dask cluster computes")
    return lambda cells, work: on_cluster(cells, work, "tcp://" + name.removeprefix("dask://"))


def on_this_machine(cells: Sequence[Cell], work: Work, jobs: int) -> Finished:
    """In `jobs` processes. Each has a pool of its own, so that a death is one cell's and nobody else's."""
    queue = _ByBudget(cells)
    running: dict[Future[Figures], tuple[_Process, Cell]] = {}
    tried: set[int] = set()
    processes = [_Process() for _ in range(min(jobs, len(cells)))]
    try:
        for process in processes:
            cell = queue.take("")
            running[process.submit(work, cell)] = process, cell
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                process, cell = running.pop(future)
                try:
                    yield cell, future.result()
                except BrokenProcessPool:
                    process.restart()
                    if id(cell) not in tried:
                        tried.add(id(cell))
                        running[process.submit(work, cell)] = process, cell
                        continue
                    yield cell, {"error": f"{DIED}, twice", "failed": True}
                except InputError:
                    raise
                except Exception as error:  # one cell's, such as a fault in a policy of the user's: the others go on
                    yield cell, {"error": f"{type(error).__name__}: {error}", "failed": True}
                if queue:
                    following = queue.take(cell.budget)
                    running[process.submit(work, following)] = process, following
    finally:
        for process in processes:
            process.stop()


class _ByBudget:
    """Cells that share a budget go to one process one after another, until others would stand idle."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._left: dict[str, deque[Cell]] = {}
        for cell in cells:
            self._left.setdefault(cell.budget, deque()).append(cell)
        self._untouched = list(self._left)

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, last: str) -> Cell:
        """The next cell for a process that has computed one of the budget `last`."""
        if last in self._left:
            budget, cell = last, self._left[last].popleft()
        elif self._untouched:
            budget = self._untouched.pop(0)
            cell = self._left[budget].popleft()
        else:
            budget = max(self._left, key=lambda budget: len(self._left[budget]))
            cell = self._left[budget].pop()
        if not self._left[budget]:
            del self._left[budget]
            self._untouched = [other for other in self._untouched if other != budget]
        return cell


class _Process:
    """A pool of one process."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _begin_worker)
        self._pid: Future[int] | None = None

    def submit(self, work: Work, cell: Cell) -> Future[Figures]:
        try:
            return self._submit(work, cell)
        except BrokenProcessPool:  # it died between two cells
            self.restart()
            return self._submit(work, cell)

    def _submit(self, work: Work, cell: Cell) -> Future[Figures]:
        if self._pid is None:
            self._pid = self._pool.submit(os.getpid)
        return self._pool.submit(work, cell)

    def stop(self) -> None:
        """At once: what it is computing is of no use to anybody any more."""
        if self._pid is not None and self._pid.done() and not self._pid.exception():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGTERM)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the parent's affair; a worker whose parent was killed must not wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def on_cluster(cells: Sequence[Cell], work: Work, address: str) -> Finished:
    """On the workers of the Dask scheduler at `address`, which gives a lost worker's cells to another."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--executor dask: needs Dask; pip install 'moeflow[cluster]'") from None
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
        client.wait_for_workers(1, timeout=CONNECT_S)
    except (OSError, TimeoutError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--executor dask: no scheduler with a worker answers at {address} within {CONNECT_S} s ({reason}); start "
            "`dask scheduler` and `dask worker`"
        ) from None
    with client:
        ordered = sorted(cells, key=lambda cell: cell.budget)
        futures = {client.submit(work, cell, pure=False): cell for cell in ordered}
        for future in as_completed(list(futures), loop=client.loop):
            cell = futures[future]
            if future.status not in ("finished", "error"):
                raise InputError(
                    f"--executor dask: the scheduler at {address} was lost; what was computed is kept: run the same "
                    "command again"
                )
            problem = future.exception()
            if isinstance(problem, InputError):
                raise problem
            if problem is None:
                yield cell, future.result()
            else:
                died = type(problem).__name__ == "KilledWorker"
                yield cell, {"error": DIED if died else f"{type(problem).__name__}: {problem}", "failed": True}
