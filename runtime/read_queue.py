"""A few threads that read, urgent things first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

THREADS = 4  # enough to keep an NVMe drive's queue busy with megabyte reads. Chosen here


class ReadQueue:
    """Jobs are called in threads of their own, first come first served within urgent ones and within the others."""

    def __init__(self, threads: int = THREADS) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._others: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None], urgent: bool) -> Future[None]:
        """Have `job` called; its exception, if any, is the future's."""
        future: Future[None] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(CancelledError())
                return future
            (self._urgent if urgent else self._others).append((future, job))
            self._changed.notify()
        return future

    def hurry(self, future: Future[None]) -> None:
        """What is waiting becomes urgent."""
        with self._changed:
            for entry in self._others:
                if entry[0] is future:
                    self._others.remove(entry)
                    self._urgent.append(entry)
                    return

    def close(self) -> None:
        """Cancel what has not begun, and wait for what has."""
        with self._changed:
            self._closed = True
            for future, _ in [*self._urgent, *self._others]:
                future.cancel()
            self._urgent.clear()
            self._others.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the collector may call this from anywhere
                thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._urgent or self._others)
                if self._closed:
                    return
                future, job = (self._urgent or self._others).popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
