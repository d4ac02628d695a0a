"""Which engine runs what: the compiled one where it covers a run, the events engine for everything."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError
from .compiled import CompiledEngine, why_not
from .events import EventsEngine, Setup

ENGINES = ("auto", "events", "compiled")


def engine_for(name: str, setup: Setup) -> tuple[EventsEngine | CompiledEngine, str, list[str]]:
    """(engine, its name, notes). Raises InputError for an unknown name or a run that the compiled one cannot do."""
    if name not in ENGINES:
        raise InputError(f"--engine {name!r}: expected one of {', '.join(ENGINES)}")
    reason = None if name == "events" else why_not(setup)
    if name == "compiled" and reason is not None:
        raise InputError(f"--engine compiled: {reason}; use --engine auto or events")
    if name == "events":
        return EventsEngine(setup), "events", []
    if reason is None:
        return CompiledEngine(setup), "compiled", []
    return EventsEngine(setup), "events", [f"events engine: {reason}"]


def with_timeline(engine: EventsEngine | CompiledEngine, make_setup: Callable[[], Setup]) -> None:
    """Give a run of the compiled engine the spans of its first steps, from the events engine: results are equal."""
    if isinstance(engine, CompiledEngine) and engine.setup.timeline_steps:
        engine.measured.spans = EventsEngine(make_setup()).first_spans()
