"""Spans as a Chrome trace, which https://ui.perfetto.dev opens. Simulator and live runtime use the same track names."""

from __future__ import annotations

import json

Span = tuple[int, int, str, str]  # start and end in picoseconds, track, label
TRACKS = ("dense", "experts", "predictor", "copy H2D", "CPU experts", "near memory")


def chrome_trace(spans: list[Span], title: str) -> str:
    """JSON text: one process, one thread per track, times in microseconds; identical spans give identical bytes."""
    events: list[dict[str, object]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": title}}]
    more = {track for _, _, track, _ in spans} - set(TRACKS)  # of further devices: "experts 1", "copy H2D 1" ...
    tracks = [*TRACKS, *sorted(more, key=lambda track: (track.rpartition(" ")[2], track))]
    for index, track in enumerate(tracks):
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": index, "args": {"name": track}})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": index, "args": {"sort_index": index}})
    for start, end, track, label in sorted(spans):
        moment = {"cat": track, "ts": start / 1e6, "dur": (end - start) / 1e6}
        events.append({"name": label, "ph": "X", "pid": 1, "tid": tracks.index(track), **moment})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"
