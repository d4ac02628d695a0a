"""The cells of a sweep: every policy with every setting, budget, machine and link, in a fixed order."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..hwprofiles.profile import Hardware, load_hardware
from ..policies.policy import DEFAULTS, KEYS, OWN_KEYS, Policy
from .result import RESULT_FORMAT

Settings = dict[str, Any]  # document key -> value; None where the policy has no such key


@dataclass(frozen=True)
class Axis:
    """Values that one key of a policy document takes in turn, such as `cache.half_life`."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One run. `policy` is None where no such policy can be, and `problem` says why."""

    name: str  # of the policy, as it was given
    settings: Settings
    budget: str
    machine: str  # as it was given
    link: str | None  # as it was given; None for the machine's own
    hardware: Hardware
    policy: Policy | None
    problem: str
    digest: str  # of everything that its figures depend on

    def __str__(self) -> str:
        chosen = "".join(f" {key}={value}" for key, value in self.settings.items() if value is not None)
        return f"{self.name}{chosen}, budget {self.budget}, {self.hardware.name} over {self.hardware.link.name}"


def parse_list(text: str, option: str) -> tuple[str, ...]:
    """`a,b,c` as its parts. Raises InputError for an empty one or one given twice."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise InputError(f"{option} {text!r}: an entry is empty; separate entries by single commas")
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise InputError(f"{option} {text!r}: {twice[0]} is given twice; leave one out")
    return parts


def parse_axis(text: str) -> Axis:
    """`cache.half_life=4,16,64`. Raises InputError for another form or a part that documents do not have."""
    key, _, values = text.partition("=")
    part, _, name = key.strip().partition(".")
    if not (name and values):
        raise InputError(f"--set {text!r}: expected a document key and its values, such as cache.half_life=4,16,64")
    if part not in DEFAULTS:
        raise InputError(f"--set {text!r}: documents have no part {part!r}; known: {', '.join(DEFAULTS)}")
    return Axis(key.strip(), tuple(_value(value, text) for value in parse_list(values, f"--set {key}")))


def distance_axis(text: str) -> Axis:
    """`--distance 1,2` as the axis prefetch.distance. Raises InputError for what is no whole number from 1 on."""
    values = parse_list(text, "--distance")
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise InputError(f"--distance {text!r}: expected layers ahead as whole numbers from 1 on, such as 1,2")
    return Axis("prefetch.distance", tuple(map(int, values)))


def _value(text: str, option: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {option!r}: {text!r} is no plain value; write a number or a word") from None
    if isinstance(value, (dict, list)):
        raise InputError(f"--set {option!r}: {text!r} is no plain value; write a number or a word")
    return value


def make_grid(
    policies: Sequence[str],
    axes: Sequence[Axis],
    budgets: Sequence[str],
    machines: Sequence[str],
    links: Sequence[str | None],
    trace_sha256: str,
    options: dict[str, Any],
) -> list[Cell]:
    """All cells, the first axis slowest: policy, settings, budget, machine, link.

    A policy that lacks a key (a prefetch distance where nothing is fetched ahead) has one cell for all its values.
    Raises InputError for unknown policies, machines and links, and for a key that no policy has.
    """
    loaded = [(name, Policy.load(name)) for name in policies]
    hardware = [(machine, link, load_hardware(machine, link)) for machine in machines for link in links]
    variants = [(name, *variant) for name, policy in loaded for variant in _variants(policy, axes)]
    for axis in axes:
        if all(settings[axis.key] is None for _, settings, _, _ in variants):
            raise InputError(f"--set {axis.key}: no policy of this sweep has such a key; `sim policies show NAME`")
    cells = []
    for (name, settings, policy, problem), budget, (machine, link, priced) in product(variants, budgets, hardware):
        digest = "" if policy is None else _digest(trace_sha256, policy, priced, budget, options)
        cells.append(Cell(name, settings, budget, machine, link, priced, policy, problem, digest))
    return cells


def _variants(policy: Policy, axes: Sequence[Axis]) -> Iterator[tuple[Settings, Policy | None, str]]:
    """The policy under each combination of settings that differ for it; (settings, policy, problem)."""
    seen: list[Settings] = []
    for values in product(*(axis.values for axis in axes)):
        wanted = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        document, settings = _changed(policy.document, wanted)
        if settings in seen:
            continue
        seen.append(settings)
        try:
            yield settings, Policy.from_document(document, policy.name, policy.name), ""
        except InputError as error:
            yield settings, None, str(error)


def _changed(document: dict[str, dict[str, Any]], wanted: Settings) -> tuple[dict[str, dict[str, Any]], Settings]:
    """A document with the wanted values, those that name a class first, and which of them took hold."""
    changed, settings = copy.deepcopy(document), dict.fromkeys(wanted)
    for key in sorted(wanted, key=lambda key: key not in KEYS.values()):
        part, _, name = key.partition(".")
        own = OWN_KEYS.get(part, ("kind",))
        if key in KEYS.values():
            if changed[part][name] != wanted[key]:  # another class has other parameters
                changed[part] = {own_key: value for own_key, value in changed[part].items() if own_key in own}
        elif not _has(changed, part, name):
            continue
        changed[part][name] = settings[key] = wanted[key]
    return changed, settings


def _has(document: dict[str, dict[str, Any]], part: str, name: str) -> bool:
    if name in OWN_KEYS.get(part, ("kind",)) or name in document[part]:
        return True
    try:  # a class that was just named: its parameters are known once it is built
        return name in Policy.from_document(copy.deepcopy(document)).document[part]
    except InputError:
        return False


def _digest(trace_sha256: str, policy: Policy, hardware: Hardware, budget: str, options: dict[str, Any]) -> str:
    """Of everything that the figures depend on, the code of the policy's classes and fitted files included."""
    priced = asdict(replace(hardware, sources={}, documents={}))
    parts = (policy.eviction(), policy.prefetch(), policy.predictor(), policy.miss_service(), policy.schedule())
    code = [inspect.getsource(sys.modules[type(part).__module__]) for part in parts if part is not None]
    files = [values.get("fitted") for values in policy.document.values()]
    fitted = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file and Path(file).is_file()]
    facts = [RESULT_FORMAT, version("moeflow"), trace_sha256, policy.document, priced, budget, options, code, fitted]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
