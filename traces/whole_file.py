"""A file appears under its name whole, or not at all."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def write_whole(path: Path, content: bytes, otherwise: str = "choose another place") -> None:
    """Write under a temporary name, then rename. Raises InputError saying what to do `otherwise`."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {otherwise}") from None
    finally:
        part.unlink(missing_ok=True)
