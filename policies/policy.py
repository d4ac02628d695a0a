"""A policy as a document of five parts, and the objects it names.

    cache:    {evict: lru, scope: layer, split: uniform}
    prefetch: {kind: none}
    predict:  {kind: none}
    miss:     {kind: wait}
    schedule: {kind: none}

`evict` and every `kind` name a file of this folder, or a class of the user's as `my.module:Class`; the remaining
keys of a part are that class's own parameters. A `split` other than uniform (layer_budget.py) reads the file that
`cache.fitted` names, or the replayed trace itself. Whatever is left out has the default shown by `--print-config`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import yaml
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace, TraceMeta
from .eviction import Eviction
from .fitted import load_fitted, share_seen
from .future import Future, future_of
from .layer_budget import KIND as LAYER_BUDGET
from .layer_budget import SPLITS, load_statistics, shares, statistics
from .miss_service import MissService
from .predictor import Predictions, Predictor, predictions_for
from .prefetch import Prefetch
from .residency import Guards, Residency, Slots
from .schedule import Schedule

FOLDER = Path(__file__).parent
PRESETS = FOLDER / "presets"
SCOPES = ("layer", "global")
WAVES = ("auto", "1", "2", "each")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cache": {"evict": "lru", "scope": "layer", "split": "uniform"},
    "prefetch": {"kind": "none", "dwell": 0, "per_layer": None, "in_flight": None},
    "predict": {"kind": "none"},
    "miss": {"kind": "wait", "waves": "auto", "scratch": 2, "chunks": 3},
    "schedule": {"kind": "none"},
}

KEYS: dict[type, str] = {  # where a document names a class of each kind
    Eviction: "cache.evict",
    Prefetch: "prefetch.kind",
    Predictor: "predict.kind",
    MissService: "miss.kind",
    Schedule: "schedule.kind",
}
OPTIONAL = ("prefetch", "predict", "schedule")  # parts that `kind: none` leaves out
OWN_KEYS = {  # the others are parameters of the class
    "cache": ("evict", "scope", "split", "fitted"),
    "prefetch": ("kind", "dwell", "per_layer", "in_flight"),
    "miss": ("kind", "waves", "scratch", "chunks"),
}

Part = TypeVar("Part", Eviction, Prefetch, Predictor, MissService, Schedule)


@dataclass(frozen=True)
class Policy:
    """A checked policy document. `name` is the preset's or the file's; `document` is complete and plain."""

    name: str
    document: dict[str, dict[str, Any]]
    summary: str = ""  # the comment that a file begins with

    @classmethod
    def load(cls, reference: str | Path) -> Policy:
        """A YAML file, or a bundled preset's name. Raises InputError naming the path of what is wrong."""
        path = Path(reference)
        if not path.is_file():
            path = PRESETS / f"{path.stem if path.suffix in ('.yaml', '.yml') else path.name}.yaml"
        if not path.is_file():
            near = get_close_matches(str(reference), preset_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give a YAML file or one of these names."
            raise InputError(f"no policy {str(reference)!r}: {hint} Bundled: {', '.join(preset_names())}")
        try:
            text = path.read_text(encoding="utf-8")
            document = yaml.safe_load(text)
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a text file; name a YAML document") from None
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}); fix it there") from None
        checked = cls.from_document(document if document is not None else {}, path.stem, str(path))
        comment = text.partition("\n")[0]
        return replace(checked, summary=comment.removeprefix("#").strip() if comment.startswith("#") else "")

    @classmethod
    def from_document(cls, document: Any, name: str = "policy", where: str = "policy") -> Policy:
        """Complete and check a document given as plain values. Raises InputError."""
        if not isinstance(document, dict):
            raise InputError(f"{where}: expected the parts {', '.join(DEFAULTS)}, found {type(document).__name__}")
        for key in document:
            _known(key, tuple(DEFAULTS), str(key), where)
            if not isinstance(document[key], dict):
                raise InputError(f"{where}: {key}: expected a mapping such as {DEFAULTS[key]}")
        complete = {part: {**default, **document.get(part, {})} for part, default in DEFAULTS.items()}
        policy = cls(name, complete)
        policy._check(where)
        return policy

    def _check(self, where: str) -> None:
        cache, miss = self.document["cache"], self.document["miss"]
        _one_of(cache["scope"], SCOPES, "cache.scope", where)
        _one_of(cache["split"], SPLITS, "cache.split", where)
        if cache["split"] != "uniform" and cache["scope"] == "global":
            raise InputError(f"{where}: cache.split: {cache['split']} shares slots among layers; use scope: layer")
        if cache["split"] == "uniform" and cache.get("fitted") is not None:
            raise InputError(f"{where}: cache.fitted: split: uniform reads no file; name another split")
        _typed(cache.get("fitted"), str | None, "cache.fitted", where)
        miss["waves"] = str(miss["waves"])
        _one_of(miss["waves"], WAVES, "miss.waves", where)
        for key in ("scratch", "chunks"):
            _whole(miss[key], 1, f"miss.{key}", where)
        guards = self.document["prefetch"]
        for key, least in (("dwell", 0), ("per_layer", 1), ("in_flight", 1)):
            if guards[key] is not None or key == "dwell":
                _whole(guards[key], least, f"prefetch.{key}", where)
        for base in KEYS:
            built = self._build(base, where)
            if built is not None:
                self.document[KEYS[base].partition(".")[0]].update(built.parameters())
        parts = (self.eviction(), self.prefetch(), self.schedule())
        reads = [part for part in parts if part is not None and "predicted" in part.needs]
        if reads and self.predictor() is None:
            raise InputError(f"{where}: predict.kind: {type(reads[0]).__name__} reads predictions; name a predictor")

    def _build(self, base: type[Part], where: str) -> Part | None:
        """A fresh object of the class that the document names; None for `kind: none` of an optional part."""
        part, _, key = KEYS[base].partition(".")
        values = self.document[part]
        own = OWN_KEYS.get(part, ("kind",))
        if part in OPTIONAL and values[key] == "none":
            for other in _rest(values, *own):
                _known(other, own, f"{part}.{other}", where)
            return None
        return _build(base, values[key], _rest(values, *own), part, where, own)

    @property
    def scope(self) -> str:
        return str(self.document["cache"]["scope"])

    @property
    def split(self) -> str:
        """How slots are shared out among layers: uniform, entropy, demand or dp."""
        return str(self.document["cache"]["split"])

    @property
    def _split_file(self) -> str | None:
        """The file a split reads; None where it is uniform or takes the replayed trace itself."""
        file = self.document["cache"].get("fitted")
        return None if file is None else str(file)

    @property
    def scratch(self) -> int:
        return int(self.document["miss"]["scratch"])

    def eviction(self) -> Eviction:
        """A fresh eviction policy object."""
        built = self._build(Eviction, self.name)
        assert built is not None
        return built

    def prefetch(self) -> Prefetch | None:
        """A fresh prefetch policy object; None for `kind: none`."""
        return self._build(Prefetch, self.name)

    def predictor(self) -> Predictor | None:
        """A fresh predictor; None for `kind: none`."""
        return self._build(Predictor, self.name)

    def miss_service(self) -> MissService:
        """A fresh miss service."""
        built = self._build(MissService, self.name)
        assert built is not None
        return built

    def schedule(self) -> Schedule | None:
        """A fresh schedule; None for `kind: none`."""
        return self._build(Schedule, self.name)

    def with_fitted(self, file: str) -> Policy:
        """The same policy with `file` as what its predictor, or else its split, was fitted to. Raises InputError."""
        predictor = self.predictor()
        if predictor is not None and predictor.trained:
            part = "predict"
        elif self.split != "uniform":
            part = "cache"
        else:
            raise InputError(f"--fitted {file}: policy {self.name} has nothing that is trained; leave it out")
        return replace(self, document={**self.document, part: {**self.document[part], "fitted": file}})

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be at hand: trace columns, or `future`."""
        parts = (self.eviction(), self.prefetch(), self.predictor(), self.miss_service(), self.schedule())
        named = [name for part in parts if part is not None for name in part.needs]
        if self.split != "uniform" and self._split_file is None:
            named.append("future")
        return tuple(dict.fromkeys(name for name in named if name != "predicted"))

    @property
    def timing_free(self) -> bool:
        """Decisions never depend on measured time."""
        parts = (self.eviction(), self.prefetch(), self.miss_service())
        untimed = all(part.timing_free for part in parts if part is not None)
        return untimed and self.guards.in_flight is None

    @property
    def guards(self) -> Guards:
        """What limits prefetches and promotions."""
        part = self.document["prefetch"]
        return Guards(part["dwell"], part["per_layer"], part["in_flight"])

    def predictions(self, trace: Trace) -> Predictions | None:
        """What its predictor says about `trace`; None when it has none. Raises InputError."""
        self._refuse_without_columns(trace)
        predictor = self.predictor()
        return None if predictor is None else predictions_for(predictor, trace)

    def in_sample(self, trace: Trace) -> float:
        """The share of the trace's requests on which its predictor or its split was fitted, 0 to 1."""
        predictor, seen = self.predictor(), [0.0]
        if predictor is not None and predictor.trained:
            seen.append(share_seen(trace, predictor.fitted().requests))
        if self._split_file is not None:
            seen.append(share_seen(trace, load_fitted(self._split_file, LAYER_BUDGET).requests))
        return max(seen)

    def shared_out(self, slots: Slots, trace: Trace) -> Slots:
        """As many slots in all, shared out among layers as `cache.split` says. Raises InputError for a wrong file."""
        if self.split == "uniform":
            return slots
        known = statistics(trace) if self._split_file is None else load_statistics(self._split_file, trace.meta.model)
        return Slots(shares(self.split, slots.held, known), slots.scratch)

    def live_slots(self, slots: Slots, model: ModelSpec) -> Slots:
        """`shared_out` for a model that runs. Raises InputError for a split that reads a trace, or a wrong file."""
        if self.split == "uniform":
            return slots
        if self._split_file is None:
            raise InputError(
                f"policy {self.name}: cache.split {self.split} would read a trace, and a model that runs has none: run "
                "`moeflow policies train layer-budget --trace TRACE` and name the file as cache.fitted"
            )
        return Slots(shares(self.split, slots.held, load_statistics(self._split_file, model)), slots.scratch)

    @property
    def oracle(self) -> bool:
        """It knows the trace's future, so no live system can do what it does."""
        return "future" in self.needs

    def residency(
        self, trace: Trace, slots: Slots, keep_log: bool = False, here: NDArray[np.bool_] | None = None
    ) -> Residency:
        """The state machine for replaying `trace`, on a device that computes the experts in `here` [L, E] (None: all).

        Raises InputError when the trace lacks a needed column.
        """
        self._refuse_without_columns(trace)
        future = future_of(trace) if self.oracle else None
        return self._residency(trace.meta, slots, future, keep_log, here)

    def live_residency(
        self, meta: TraceMeta, slots: Slots, columns: Collection[str], keep_log: bool = False
    ) -> Residency:
        """The state machine for a model that runs and supplies `columns`. Raises InputError for what it cannot do."""
        if self.oracle:
            raise InputError(f"policy {self.name} knows a trace's future; a model that runs has none: choose another")
        for column in self.needs:
            if column not in columns:
                raise InputError(f"policy {self.name} needs the column {column!r}, which the live runtime has not")
        return self._residency(meta, slots, None, keep_log, None)

    def _residency(
        self, meta: TraceMeta, slots: Slots, future: Future | None, keep_log: bool, here: NDArray[np.bool_] | None
    ) -> Residency:
        model, eviction, prefetch, service = meta.model, self.eviction(), self.prefetch(), self.miss_service()
        eviction.start(meta, slots, future)
        if prefetch is not None:
            prefetch.start(meta, future)
        service.start(meta)
        layers = len(model.moe_layers)
        return Residency(
            layers, model.experts, model.top_k, slots, eviction, prefetch, keep_log, service, self.guards, here
        )

    def _refuse_without_columns(self, trace: Trace) -> None:
        for column in self.needs:
            if column != "future" and getattr(trace, column, trace.extra.get(column)) is None:
                raise InputError(
                    f"policy {self.name} needs the column {column!r}, which the trace lacks: "
                    f"record with --{column.split('_')[0]} or choose a policy that does not need it"
                )


def preset_names() -> tuple[str, ...]:
    """Names of the bundled policy documents."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def find_class(base: type[Part], name: str, where: str) -> type[Part]:
    """The one subclass of `base` in this folder's file `name`, or the user's `my.module:Class`. Raises InputError."""
    part = KEYS[base]
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"{where}: {part}: cannot import {name!r} ({error}); check the module path") from None
        if not (isinstance(found, type) and issubclass(found, base)):
            raise InputError(f"{where}: {part}: {name} is not a subclass of {base.__name__}")
        return found
    known = [path.stem.replace("_", "-") for path in sorted(FOLDER.glob("*.py")) if _policy_of(base, path.stem)]
    found_here = _policy_of(base, name.replace("-", "_")) if name in known else None
    if found_here is None:
        raise InputError(f"{where}: {part}: no policy {name!r}; known: {', '.join(known)}, or my.module:Class")
    return found_here


def _policy_of(base: type[Part], stem: str) -> type[Part] | None:
    if f"({base.__name__})" not in (FOLDER / f"{stem}.py").read_text(encoding="utf-8"):
        return None
    module = importlib.import_module(f".{stem}", __package__)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__:
            return value
    return None


def _build(
    base: type[Part], name: Any, parameters: dict[str, Any], part: str, where: str, own: tuple[str, ...]
) -> Part:
    cls: type[Part] = find_class(base, str(name), where)
    for key in parameters:
        _known(key, (*own, *inspect.signature(cls).parameters), f"{part}.{key}", where)
        _typed(parameters[key], get_type_hints(cls.__init__).get(key), f"{part}.{key}", where)
    try:
        return cls(**parameters)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {part}: {name}: {error}") from None


def _typed(value: Any, wanted: Any, path: str, where: str) -> None:
    """Against the annotation of the class's parameter; a whole number is a number, a truth value is neither."""
    allowed = get_args(wanted) or (wanted,)
    if float in allowed:
        allowed += (int,)
    plain = tuple(kind for kind in allowed if isinstance(kind, type))
    if plain and (not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain)):
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in plain))
        raise InputError(f"{where}: {path}: expected {names}, found {value!r}")


def _whole(value: Any, least: int, path: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{where}: {path}: expected a whole number from {least} on, found {value!r}")


def _rest(values: dict[str, Any], *own: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in own}


def _known(key: Any, known: tuple[str, ...], path: str, where: str) -> None:
    if key not in known:
        choices = f"known: {', '.join(known)}" if known else "this part takes no such key"
        raise InputError(f"{where}: {path}: unknown key; {choices}")


def _one_of(value: Any, known: tuple[str, ...], path: str, where: str) -> None:
    if value not in known:
        raise InputError(f"{where}: {path}: {value!r} is not one of {', '.join(known)}")
