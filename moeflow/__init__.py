"""moeflow: record MoE routing, replay it on modelled hardware, run the same policy live.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .policies.policy import Policy
    from .runtime.offload import offload, stats
    from .sim.run import simulate
    from .traces.reader import load_trace

__version__ = "0.1.0"
__all__ = ["InputError", "Policy", "load_trace", "offload", "simulate", "stats"]

_HOME = {
    "InputError": ".errors",
    "Policy": ".policies.policy",
    "load_trace": ".traces.reader",
    "offload": ".runtime.offload",
    "simulate": ".sim.run",
    "stats": ".runtime.offload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        from .errors import InputError

        raise InputError(f"moeflow.{name} needs {error.name}: pip install 'moeflow[live]'") from None
