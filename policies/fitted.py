"""Files of fitted parameters: arrays and one JSON document, as safetensors; reading one runs no code.

The document says what was fitted, on which requests, how well it does and how long a call takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import Trace

FORMAT = 1


@dataclass(frozen=True)
class Fitted:
    """One fitted file. `requests`: digests (`request_digests`) of the requests it was fitted on."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    settings: dict[str, Any]  # plain values that the predictor needs back
    metrics: dict[str, Any]  # how well it does, on requests it was not fitted on
    requests: tuple[str, ...]
    seconds_per_call: float | None  # one call for one token, measured where it was fitted
    sha256: str = field(default="", compare=False)

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name, then rename it. Raises InputError where it cannot be written."""
        text = {
            "format": FORMAT, "kind": self.kind, "settings": self.settings, "metrics": self.metrics,
            "requests": sorted(self.requests), "seconds_per_call": self.seconds_per_call,
        }  # fmt: skip
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(part, self.arrays, text)
            part.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot write there ({error.strerror}); choose another file") from None
        finally:
            if part.exists():
                part.unlink()


def load_fitted(path: str | Path, kind: str) -> Fitted:
    """Read a file that `Fitted.save` wrote for the predictor `kind`. Raises InputError for anything else."""
    path = Path(path)
    try:
        arrays, text = load_arrays(path)
        content = path.read_bytes()
        found = Fitted(
            text["kind"], arrays, text["settings"], text["metrics"], tuple(text["requests"]),
            text["seconds_per_call"], hashlib.sha256(content).hexdigest(),
        )  # fmt: skip
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such fitted file; make one with `moeflow policies train {kind} --trace TRACE`"
        ) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a fitted file of moeflow ({error}); train it again") from None
    if found.kind != kind:
        raise InputError(f"{path}: fitted for {found.kind!r}, not for {kind!r}; name the file of {kind}")
    return found


def request_digests(trace: Trace) -> dict[int, str]:
    """Per request, a digest of what it routed: the same wherever its rows stand, in whatever batches."""
    order = np.argsort(trace.request, kind="stable")
    requests, first = np.unique(trace.request[order], return_index=True)
    parts = np.split(order, first[1:])
    return {
        int(request): hashlib.sha256(np.ascontiguousarray(trace.experts[rows]).tobytes()).hexdigest()[:16]
        for request, rows in zip(requests, parts, strict=True)
    }


def share_seen(trace: Trace, digests: tuple[str, ...]) -> float:
    """The share of the trace's requests that are among `digests`: how far a run is in-sample."""
    own = request_digests(trace)
    return len([digest for digest in own.values() if digest in set(digests)]) / max(1, len(own))


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], document: dict[str, Any]) -> None:
    """Arrays and a JSON document in one safetensors file."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, str(path), {"moeflow": json.dumps(document, sort_keys=True)})


def load_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The inverse of `save_arrays`. Raises OSError, or ValueError for a file of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "numpy") as opened:
            document = json.loads((opened.metadata() or {})["moeflow"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, document  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from None
