"""The link between host and device memory: alpha + bytes / bandwidth, what submitting costs, both ways at once."""

from __future__ import annotations

import threading

from .calibrate_fit import Line, line
from .calibrate_number import Number, Numbers, fitted, timed
from .calibrate_subject import Subject
from .calibrate_timing import MIB, Timing, repeated

QUEUED = MIB  # bytes of the copies that are queued, to see what a queue changes. Chosen here
WHAT = {"h2d": "copies from pinned host memory", "pageable": "copies from pageable host memory", "d2h": "copies back"}


def link(subject: Subject) -> Numbers:
    """All numbers of a link between host and device, `peer` excepted."""
    lines = {way: _isolated(subject, way) for way in WHAT}
    submit = submission(subject)
    numbers = {"link.submit_s": submit, "link.submit_batched_s": _batched(submit)}
    for way in ("h2d", "d2h"):
        fit, timings = lines[way]
        alpha = max(0.0, fit.alpha - submit.value)
        note = _queued_note(subject, way)
        numbers[f"link.{way}.alpha_s"] = fitted(alpha, fit, timings, f"{WHAT[way]}, less submit_s")
        numbers[f"link.{way}.bandwidth"] = fitted(fit.rate, fit, timings, WHAT[way], note)
    fit, timings = lines["pageable"]
    note = f"here one copy costs {fit.alpha * 1e6:.3g} us beside its bytes"
    numbers["link.h2d.pageable_bandwidth"] = fitted(fit.rate, fit, timings, WHAT["pageable"], note)
    numbers["link.duplex"] = duplex(subject, lines["h2d"][0], lines["d2h"][0])
    return numbers


def _isolated(subject: Subject, way: str) -> tuple[Line, list[Timing]]:
    sizes = subject.effort.copy_bytes
    timings = [repeated(lambda size=size: one_copy(subject, way, size), subject.effort) for size in sizes]  # type: ignore[misc]
    return line(sizes, [timing.seconds for timing in timings]), timings


def one_copy(subject: Subject, way: str, size: int) -> float:
    """Seconds from asking for a copy on an idle link to knowing that it has ended."""
    subject.drain()
    began = subject.now()
    subject.join(way, subject.copy(way, size))
    return (subject.now() - began) / 1e9


def submission(subject: Subject) -> Number:
    """Seconds of the host's thread per copy that goes on without it."""
    if not subject.asynchronous:
        return Number(0.0, "the thread that asks for a copy makes it: all of its time is in alpha_s", "derived")
    count, size = subject.effort.issued, min(subject.effort.copy_bytes)

    def once() -> float:
        return subject.host_seconds(lambda: [subject.copy("h2d", size) for _ in range(count)])

    return timed(repeated(once, subject.effort), f"{count} copies submitted in a row", count)


def _batched(submit: Number) -> Number:
    if submit.kind == "derived":
        return submit
    return Number(submit.value, "same as submit_s: the runtime submits each copy of a batch by itself", "derived")


def _queued_note(subject: Subject, way: str) -> str:
    count = max(1, min(subject.effort.issued, subject.effort.buffer_bytes // QUEUED))
    rate = count * QUEUED / repeated(lambda: together(subject, {way: QUEUED}, count), subject.effort).seconds
    return f"{count} queued copies of 1 MiB reached {rate / 1e9:.4g} GB/s"


def duplex(subject: Subject, there: Line, back: Line) -> Number:
    """The share of each direction's bandwidth that is kept while both run, for as long as each alone would take."""
    most, count = max(subject.effort.copy_bytes), 4
    faster = max(there.rate, back.rate)
    sizes = {"h2d": int(most * there.rate / faster), "d2h": int(most * back.rate / faster)}
    alone = [repeated(lambda way=way: together(subject, {way: sizes[way]}, count), subject.effort) for way in sizes]  # type: ignore[misc]
    both = repeated(lambda: together(subject, sizes, count), subject.effort)
    share = min(1.0, max(timing.seconds for timing in alone) / both.seconds)
    how = f"{count} copies of {most / MIB:.4g} MiB each way, both ways at once against alone, {both}"
    return Number(share, how, scatter=max(timing.spread for timing in (*alone, both)))


def together(subject: Subject, sizes: dict[str, int], count: int) -> float:
    """Seconds for so many copies in each of these directions, all asked for at once."""
    subject.drain()
    began = subject.now()
    if subject.asynchronous:
        marks = [(way, subject.copy(way, size)) for _ in range(count) for way, size in sizes.items()]
        for way, mark in marks:
            subject.join(way, mark)
    else:
        threads = [threading.Thread(target=_in_turn, args=(subject, way, size, count)) for way, size in sizes.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return (subject.now() - began) / 1e9


def _in_turn(subject: Subject, way: str, size: int, count: int) -> None:
    for _ in range(count):
        subject.copy(way, size)
