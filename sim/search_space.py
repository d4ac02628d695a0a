"""Which policies a trace permits, as a space for a search to draw from: no oracle, no predictor that needs training.

Ranges are chosen here: a parameter that is a share is drawn from the whole of (0, 1), any other number within a factor
of eight of its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import InputError
from ..policies.eviction import Eviction
from ..policies.layer_budget import SPLITS
from ..policies.miss_service import MissService
from ..policies.policy import FOLDER, WAVES, Policy, find_class
from ..policies.prefetch import Prefetch
from ..traces.trace import Trace

if TYPE_CHECKING:
    from optuna.trial import Trial

EXACTNESS = ("bit", "numeric", "lossy")
PREDICTOR = "next-gate"  # the one that needs no training
WITHIN = 8  # factor around a default
FARTHEST = 4  # layers ahead, where the trace does not say


@dataclass(frozen=True)
class Space:
    """What may be drawn for a trace. `allowed`: exactness classes; `slots`: fewest and most per layer."""

    trace: Trace
    allowed: tuple[str, ...]
    slots: tuple[int, int]
    split_file: str | None = None  # fitted statistics for cache.split; None: equal shares only
    near_memory: bool = False  # the machine has a unit

    def document(self, trial: Trial) -> dict[str, dict[str, Any]]:
        """One policy document, drawn."""
        cache: dict[str, Any] = {"evict": trial.suggest_categorical("evict", list(self.evictions))}
        cache |= self._parameters(trial, f"evict.{cache['evict']}", self.evictions[cache["evict"]])
        cache["scope"] = trial.suggest_categorical("scope", ["layer", "global"])
        if cache["scope"] == "layer" and self.split_file is not None:
            cache["split"] = trial.suggest_categorical("split", list(SPLITS))
            if cache["split"] != "uniform":
                cache["fitted"] = self.split_file
        prefetch = self._prefetch(trial)
        miss: dict[str, Any] = {"kind": trial.suggest_categorical("miss", list(self.services))}
        miss |= self._parameters(trial, f"miss.{miss['kind']}", self.services[miss["kind"]])
        miss |= {
            "waves": trial.suggest_categorical("waves", list(WAVES)),
            "scratch": trial.suggest_int("scratch", 1, 4),
        }
        classes = (self.evictions[cache["evict"]], self.prefetches.get(prefetch["kind"]))
        reads = any("predicted" in cls.needs for cls in classes if cls is not None)
        return {
            "cache": cache,
            "prefetch": prefetch,
            "predict": {"kind": PREDICTOR if reads else "none"},
            "miss": miss,
        }

    def budget(self, trial: Trial, scratch: int) -> str:
        """Slots in all, scratch included; the same for either scope."""
        layers = len(self.trace.meta.model.moe_layers)
        return str(trial.suggest_int("slots_per_layer", *self.slots) * layers + scratch)

    def drawn(self, policy: Policy, slots_per_layer: int) -> dict[str, Any]:
        """What would have to be drawn for a policy with default parameters: where a search may begin."""
        document = policy.document
        values = {"evict": document["cache"]["evict"], "scope": document["cache"]["scope"]}
        values |= {"prefetch": document["prefetch"]["kind"], "miss": document["miss"]["kind"]}
        values |= {"waves": document["miss"]["waves"], "scratch": document["miss"]["scratch"]}
        return values | {"slots_per_layer": slots_per_layer}

    @cached_property
    def evictions(self) -> dict[str, type[Eviction]]:
        """By name in documents, those that the trace's columns can feed."""
        return dict(self._served(Eviction))

    @cached_property
    def prefetches(self) -> dict[str, type[Prefetch]]:
        """As `evictions`."""
        return dict(self._served(Prefetch))

    @cached_property
    def services(self) -> dict[str, type[MissService]]:
        """As `evictions`, of the exactness classes that are allowed and with what the machine has."""
        return {
            name: cls
            for name, cls in self._served(MissService)
            if cls.exactness in self.allowed and (self.near_memory or not cls.near_memory)
        }

    def _served(self, base: Any) -> Iterator[tuple[str, Any]]:
        has = set(self.trace.columns) | ({"predicted"} if self.trace.lookahead is not None else set())
        for path in sorted(FOLDER.glob("*.py")):
            if f"({base.__name__})" in path.read_text(encoding="utf-8"):
                name = path.stem.replace("_", "-")
                cls = find_class(base, name, "search")
                if has.issuperset(cls.needs):
                    yield name, cls

    def _prefetch(self, trial: Trial) -> dict[str, Any]:
        part: dict[str, Any] = {"kind": trial.suggest_categorical("prefetch", ["none", *self.prefetches])}
        if part["kind"] == "none":
            return part
        cls = self.prefetches[part["kind"]]
        part |= self._parameters(trial, f"prefetch.{part['kind']}", cls)
        part["dwell"] = trial.suggest_categorical("dwell", [0, 2, 8])
        for guard in ("per_layer", "in_flight"):
            most = trial.suggest_categorical(guard, [0, 1, 2, 4, 8])
            part[guard] = most or None  # 0 draws no guard
        return part

    def _parameters(self, trial: Trial, prefix: str, cls: type) -> dict[str, Any]:
        """The class's own numbers and flags; what is text, or may be left out, keeps its default."""
        chosen: dict[str, Any] = {}
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
        for name, parameter in inspect.signature(cls).parameters.items():
            label, default = f"{prefix}.{name}", parameter.default
            if name == "distance":
                recorded = {"lookahead", "predicted"} & set(getattr(cls, "needs", ()))
                known = self.trace.meta.lookahead_distances if recorded else ()
                farthest = min(FARTHEST, len(self.trace.meta.model.moe_layers))
                chosen[name] = trial.suggest_categorical(label, list(known or range(1, farthest + 1)))
            elif hints.get(name) is bool:
                chosen[name] = trial.suggest_categorical(label, [False, True])
            elif hints.get(name) is int:
                chosen[name] = trial.suggest_int(label, max(1, default // WITHIN), max(1, default) * WITHIN, log=True)
            elif hints.get(name) is float and 0 < default < 1:
                chosen[name] = trial.suggest_float(label, 0.01, 0.99)
            elif hints.get(name) is float and default > 0:
                chosen[name] = trial.suggest_float(label, default / WITHIN, default * WITHIN, log=True)
        return chosen


def allowed_classes(text: str | None) -> tuple[str, ...]:
    """`--allow numeric,lossy` as exactness classes; bit is always among them. Raises InputError."""
    named = [] if text is None else [part.strip() for part in text.split(",")]
    for name in named:
        if name not in EXACTNESS:
            raise InputError(f"--allow {text!r}: {name!r} is not one of {', '.join(EXACTNESS[1:])}")
    return tuple(name for name in EXACTNESS if name == "bit" or name in named)
