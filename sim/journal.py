"""What long work has finished so far: one line of JSON each, safe on disk before the next begins."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError


class Journal:
    """A file of `[key, value]` lines that survives a kill at any moment.

    A last line without its end was cut off while it was written, so it is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._end = 0  # bytes of complete lines
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); remove it, or name another --out") from None
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self._read(number, line)
            self._end += len(line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            key, value = json.loads(line)
            self.entries[key] = value
        except (ValueError, TypeError):
            raise InputError(
                f"{self.path}: line {number} is damaged; remove that line, and what it held is computed again"
            ) from None

    def append(self, key: str, value: Any) -> None:
        """Add an entry and force it to disk. Raises InputError where it does not fit; earlier entries stay."""
        line = json.dumps([key, value]).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, self._end)  # what a kill or a full disk left of a line
                os.lseek(descriptor, self._end, os.SEEK_SET)
                _write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if full else "make it writable"
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); what was computed before is kept there: "
                f"{remedy} and run the same command again"
            ) from None
        self._end += len(line)
        self.entries[key] = value

    def remove(self) -> None:
        """Everything is in its final place."""
        self.path.unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
