"""The compiler for hot steps: numba where it is installed, plain Python (same results, slower) where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    COMPILED = False
else:
    COMPILED = True


def compiled(function: F) -> F:
    """Compile `function` on first use and cache the machine code between runs."""
    if not COMPILED:
        return function
    return numba.njit(cache=True, nogil=True)(function)


def bare(function: F) -> F:
    """Compile a function that makes no arrays: it then counts no references to those that it is handed, which would
    take most of its time (twenty arrays to a call, two atomic operations for each)."""
    if not COMPILED:
        return function
    return numba.njit(cache=True, nogil=True, _nrt=False)(function)
