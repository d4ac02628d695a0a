"""Hardware profiles: YAML documents, checked against `schema.json`, as frozen dataclasses in SI units.

A machine names its link and its storage, and a near-memory unit if it has one, so that one machine can be priced with
others. Every number in
a document is `{value, unit, kind, source}`; docs/hardware.md explains the layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..errors import InputError

FOLDER = Path(__file__).parent
KINDS = ("machine", "link", "storage", "near_memory")
SUFFIXES = (".yaml", ".yml")

Section = TypeVar("Section")
Values: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What computes and holds the expert slots. FLOP/s, bytes, bytes/s, seconds; `*_achieved` are shares."""

    flops: float  # dense 16-bit, accumulated in 32
    flops_achieved: float  # share of `flops` that a large matrix product reaches
    memory_bytes: int
    memory_bandwidth: float
    memory_achieved: float  # share of `memory_bandwidth` that a streaming kernel reaches
    reserve_bytes: int  # context and workspaces: never available to slots
    op_latency_s: float  # fixed device time of any kernel
    unified_memory: bool  # the host's memory is this memory: a copy costs alpha (a flush), no bytes


@dataclass(frozen=True)
class Host:
    """The host thread that issues work, and the host's memory and cores. Seconds, bytes, bytes/s, FLOP/s."""

    issue_s: float  # host thread, per eagerly issued kernel
    graph_issue_s: float  # host thread, per captured graph segment
    launch_latency_s: float  # from issue to start on an idle device
    sync_s: float  # reading the routing back, beyond draining the device
    sample_s: float  # host side of sampling a token
    predictor_s: float  # one call of a learned predictor
    policy_s: float  # the policy's decisions for one layer
    memory_bytes: int
    memory_bandwidth: float  # what CPU kernels and copies reach together
    cpu_flops: float  # reached by expert products on the CPU


@dataclass(frozen=True)
class CopyDirection:
    """One copy takes `alpha_s` when its engine was idle, plus bytes / bandwidth (seconds, bytes/s)."""

    alpha_s: float
    bandwidth: float  # pinned host memory
    pageable_bandwidth: float | None = None  # expert-sized copies from pageable memory; host to device only


@dataclass(frozen=True)
class Link:
    """The path between host memory and device memory."""

    name: str
    calibrated: bool
    h2d: CopyDirection
    d2h: CopyDirection
    duplex: float  # fraction of each direction's bandwidth kept while both run
    submit_s: float  # host thread, per copy
    submit_batched_s: float  # host thread, per further copy of one batched submission
    peer: CopyDirection | None = None  # from one device to another of the same machine; None: through host memory


@dataclass(frozen=True)
class Storage:
    """Where experts rest that host memory does not hold.

    Reads are rounded up to whole blocks; the rate is the smaller of `read_bandwidth` and
    `queue_depth * block_bytes / latency_s`.
    """

    name: str
    calibrated: bool
    read_bandwidth: float  # bytes/s, large direct reads
    latency_s: float  # of one block at queue depth 1
    block_bytes: int  # of one read request
    queue_depth: int  # requests kept in flight


@dataclass(frozen=True)
class NearMemory:
    """Memory that computes with the experts it holds: processing in or near memory. Bytes/s, FLOP/s, bytes, seconds.

    Activations go in at `write_bandwidth`; sums, and experts that are fetched after all, come out at `read_bandwidth`.
    """

    name: str
    calibrated: bool
    internal_bandwidth: float  # at which the unit reads the weights it computes with
    flops: float  # dense 16-bit operations it reaches, emulated where it has none
    capacity_bytes: int  # for experts
    alpha_s: float  # from the command to the start of computing
    write_bandwidth: float
    read_bandwidth: float


@dataclass(frozen=True)
class Hardware:
    """A machine with its link, its storage and, where it has one, its near-memory unit.

    `calibrated` is true when machine and link both are, on the same box; `storage.calibrated` (here: on that box too)
    and `near_memory.calibrated` count only for runs in which experts rest there. `sources` maps a dotted path
    (`device.flops`, `link.h2d.alpha_s`) to `kind: source`; `documents` maps each kind of document to its file.
    """

    name: str
    description: str
    calibrated: bool
    dispatch: str  # eager | graph
    device: Device
    host: Host
    link: Link
    storage: Storage
    near_memory: NearMemory | None = None
    sources: dict[str, str] = field(default_factory=dict, repr=False)
    documents: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Document:
    """One profile document, its `extends` chain merged in; numbers still carry unit, kind and source."""

    kind: str
    name: str
    path: Path
    values: Values

    @property
    def file(self) -> str:
        """How messages and results name the document."""
        return _shown(self.path)

    def quantities(self) -> Iterator[tuple[str, Values]]:
        """Dotted path and `{value, unit, kind, source}` of every number, in schema order."""
        return _quantities(self.values, _schema()["$defs"][self.kind])


def load_hardware(
    name_or_path: str | Path, link: str | None = None, storage: str | None = None, near_memory: str | None = None
) -> Hardware:
    """The machine of a YAML file, or the bundled one of that name, with its own or another link, storage and unit.

    Raises InputError for an unknown name, an invalid document or a document of another kind.
    """
    documents = load_documents(load_document(str(name_or_path), "machine"), link, storage, near_memory)
    machine = documents["machine"]
    its_link = _link(documents["link"])
    return Hardware(
        name=machine.name,
        description=machine.values["description"],
        calibrated=calibrated(documents),
        dispatch=machine.values["dispatch"],
        device=_section(Device, machine.values["device"]),
        host=_section(Host, machine.values["host"]),
        link=its_link,
        storage=replace(
            _section(Storage, documents["storage"].values), calibrated=_measured_beside(machine, documents["storage"])
        ),
        near_memory=_section(NearMemory, documents["near_memory"].values) if "near_memory" in documents else None,
        sources={path: source for document in documents.values() for path, source in _sources(document)},
        documents={kind: document.file for kind, document in documents.items()},
    )


def load_documents(
    machine: Document, link: str | None = None, storage: str | None = None, near_memory: str | None = None
) -> dict[str, Document]:
    """A machine's document with those of its own or another link, storage and unit, by kind. Raises InputError."""
    parts = {"machine": machine}
    for kind, chosen in (("link", link), ("storage", storage), ("near_memory", near_memory)):
        if chosen is not None:
            parts[kind] = load_document(str(chosen), kind)
        elif kind in machine.values:
            parts[kind] = load_document(machine.values[kind], kind, beside=machine.path)
    return parts


def calibrated(documents: dict[str, Document]) -> bool:
    """Whether the machine and its link were measured, and on the same box."""
    machine = documents["machine"]
    return bool(machine.values["calibrated"]) and _measured_beside(machine, documents["link"])


def _measured_beside(machine: Document, other: Document) -> bool:
    """`other` was measured where the machine was: numbers of two boxes are no calibration of either."""
    boxes = (document.values.get("measured_on", {}) for document in (machine, other))
    one, two = ({key: box.get(key) for key in ("device", "host")} for box in boxes)
    return bool(other.values["calibrated"]) and one == two


def load_link(name_or_path: str | Path) -> Link:
    """A link alone, found like `load_hardware` finds a machine. Raises InputError."""
    return _link(load_document(str(name_or_path), "link"))


def load_storage(name_or_path: str | Path) -> Storage:
    """A storage alone, found like `load_hardware` finds a machine. Raises InputError."""
    return _section(Storage, load_document(str(name_or_path), "storage").values)


def load_near_memory(name_or_path: str | Path) -> NearMemory:
    """A near-memory unit alone, found like `load_hardware` finds a machine. Raises InputError."""
    return _section(NearMemory, load_document(str(name_or_path), "near_memory").values)


def list_profiles() -> dict[str, tuple[str, ...]]:
    """Bundled names per kind of document, sorted; names beginning with `_` are bases and not listed."""
    kinds = {path.stem: _parse(path)["kind"] for path in sorted(FOLDER.glob("[!_]*.yaml"))}
    return {kind: tuple(name for name, its in kinds.items() if its == kind) for kind in KINDS}


def load_document(reference: str, kind: str | None = None, beside: Path | None = None) -> Document:
    """Find, check and merge one document.

    `beside` is the file whose text contains the reference: its siblings come before the bundled documents.
    Raises InputError, also when the document is not of the given kind.
    """
    path = _find(reference, beside)
    own = _parse(path)
    if kind is not None and own["kind"] != kind:
        raise InputError(f"{_shown(path)}: not a {kind} but a {own['kind']}; `sim hw list` shows every {kind}")
    values = _merged(path, own, ())
    values["name"] = own.get("name", path.stem)
    _check(values, f"complete_{own['kind']}", path)
    return Document(own["kind"], values["name"], path, values)


def _link(document: Document) -> Link:
    values = document.values
    parts = {"h2d": _section(CopyDirection, values["h2d"]), "d2h": _section(CopyDirection, values["d2h"])}
    if "peer" in values:
        parts["peer"] = _section(CopyDirection, values["peer"])
    return _section(Link, {**values, **parts})


def _section(cls: type[Section], values: Values) -> Section:
    names = [item.name for item in fields(cls) if item.name in values]  # type: ignore[arg-type]
    return cls(**{name: _plain(values[name]) for name in names})


def _plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    whole = value["unit"] == "B" or (value["unit"] == "1" and isinstance(value["value"], int))
    return int(value["value"]) if whole else float(value["value"])


def _sources(document: Document) -> Iterator[tuple[str, str]]:
    prefix = "" if document.kind == "machine" else f"{document.kind}."
    for path, quantity in document.quantities():
        yield prefix + path, f"{quantity['kind']}: {quantity['source']}"


def _quantities(values: Values, schema: Values, at: str = "") -> Iterator[tuple[str, Values]]:
    for key, child in schema["properties"].items():
        value = values.get(key)
        if not isinstance(value, dict):
            continue
        if _is_quantity(value):
            yield at + key, value
        else:
            definition = _schema()["$defs"][child["$ref"].rpartition("/")[2]]
            yield from _quantities(value, definition, f"{at}{key}.")


def _is_quantity(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value


# --- finding, reading and merging documents


def _find(reference: str, beside: Path | None) -> Path:
    for candidate in _candidates(reference, beside):
        itself = beside is not None and candidate.resolve() == beside.resolve()
        if candidate.suffix in SUFFIXES and candidate.is_file() and not itself:
            return candidate
    stem = reference.removesuffix(".yaml").removesuffix(".yml")
    bundled = FOLDER / f"{stem}.yaml"
    if Path(stem).name == stem and bundled.is_file():
        return bundled
    where = f"{_shown(beside)}: " if beside is not None else ""
    raise InputError(f"{where}no hardware profile {reference!r}; {_suggestion(stem)}`sim hw list` shows all")


def _candidates(reference: str, beside: Path | None) -> tuple[Path, ...]:
    if beside is None:
        return (Path(reference),)
    return beside.parent / reference, beside.parent / f"{reference}.yaml"


def _suggestion(stem: str) -> str:
    known = [path.stem for path in FOLDER.glob("[!_]*.yaml")]
    close = get_close_matches(Path(stem).name.lower(), sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _shown(path: Path) -> str:
    return f"hwprofiles/{path.name}" if path.parent == FOLDER else str(path)


def _merged(path: Path, own: Values, chain: tuple[Path, ...]) -> Values:
    """A document's values laid over those of the document it extends, and so on down the chain."""
    if "extends" not in own:
        return dict(own)
    chain = (*chain, path.resolve())
    base_path = _find(own["extends"], path)
    if base_path.resolve() in chain:
        names = " -> ".join(_shown(step) for step in (*chain, base_path))
        raise InputError(f"{_shown(path)}: extends: goes round in a circle ({names}); remove one `extends`")
    base = _parse(base_path)
    if base["kind"] != own["kind"]:
        raise InputError(f"{_shown(path)}: extends: {_shown(base_path)} is a {base['kind']}; extend the same kind")
    inherited = _merged(base_path, base, chain)
    if inherited.get("calibrated"):  # a changed copy of a measured profile has not been measured
        del inherited["calibrated"]
    inherited.pop("measured_on", None)
    del own["extends"]
    return _overlay(inherited, own)


def _overlay(base: Values, own: Values) -> Values:
    """Deep merge; a number is replaced whole, so that a new value never keeps the old one's source."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        deeper = isinstance(value, dict) and isinstance(below, dict) and not _is_quantity(value)
        merged[key] = _overlay(below, value) if deeper else value  # type: ignore[arg-type]
    return merged


def _parse(path: Path) -> Values:
    """One file's own values, checked as far as a partial document can be."""
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_yaml_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{_shown(path)}: not valid YAML{line} ({problem}); correct the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{_shown(path)}: cannot be read ({error}); give a YAML text file") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{_shown(path)}: holds no keys; begin it with `kind: machine` or one of {', '.join(KINDS[1:])}"
        )
    if values.get("kind") not in KINDS:
        found = values.get("kind")
        raise InputError(f"{_shown(path)}: kind: is {found!r}, must be one of {', '.join(KINDS)}")
    _check(values, values["kind"], path)
    return values


@cache
def _yaml_loader() -> Any:
    """A safe loader that reads `1.65e14` as a number, has no `.nan` or `.inf`, and refuses a repeated key."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                problem = f"{twice[0]!r} given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    floats = "tag:yaml.org,2002:float"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != floats]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")
    Loader.add_implicit_resolver(floats, number, list("-+.0123456789"))
    return Loader


# --- checking against the schema


@cache
def _schema() -> Values:
    schema: Values = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    return schema


@cache
def _validator(definition: str) -> Any:
    from jsonschema import Draft202012Validator  # 0.1 s to import: only when a document is read

    return Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": _schema()["$defs"]})


def _check(values: Values, definition: str, path: Path) -> None:
    """Raise InputError for the first thing in the document that the definition does not allow."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(definition).iter_errors(values))
    if error is not None:
        raise InputError(f"{_shown(path)}: {_sentence(error)}")


def _sentence(error: Any) -> str:
    """What a schema error means, beginning with the dotted path of the key."""
    at = ".".join(str(part) for part in error.absolute_path)
    prefix = f"{at}." if at else ""
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = next(key for key in error.instance if key not in known)
        return f"{prefix}{unknown}: unknown key; known: {', '.join(known)}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        unit = _unit(error.schema)
        remedy = f"write {_pattern(unit)}" if unit else "give it, or `extends` a document that has it"
        return f"{prefix}{missing}: missing; {remedy}"
    if error.validator == "type" and _unit(error.schema):
        return f"{at}: bare value {error.instance!r}; write {_pattern(_unit(error.schema), error.instance)}"
    if error.validator == "const":
        return f"{at}: is {error.instance!r}, must be {error.validator_value!r}"
    return f"{at}: {error.message}"


def _unit(schema: Values) -> str:
    return str(schema.get("properties", {}).get("unit", {}).get("const", ""))


def _pattern(unit: str, value: object = "...") -> str:
    kinds = "|".join(_schema()["$defs"]["kind"]["enum"])
    return f"{{value: {value}, unit: {unit}, kind: {kinds}, source: where it is from}}"
