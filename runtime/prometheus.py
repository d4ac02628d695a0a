"""What `moeflow.stats` says, in Prometheus' text format: write it where a scraper or a node exporter finds it.

prometheus_text(moeflow.stats(model))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Samples = list[tuple[dict[str, str], float]]


def prometheus_text(statistics: Mapping[str, Any]) -> str:
    """Exposition format 0.0.4. Every sample carries the policy and the device; counters count since offloading."""
    always = {"policy": str(statistics["policy"]), "device": str(statistics["device"])}
    lines: list[str] = []
    for name, kind, says, samples in _metrics(statistics):
        lines += [f"# HELP moeflow_{name} {says}", f"# TYPE moeflow_{name} {kind}"]
        for labels, value in samples:
            shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in (always | labels).items())
            lines.append(f"moeflow_{name}{{{shown}}} {value:.17g}")
    return "\n".join(lines) + "\n"


def _metrics(of: Mapping[str, Any]) -> list[tuple[str, str, str, Samples]]:
    """(name, type, help, samples)."""
    layers, moved = of["layers"], of["bytes"]
    syncs = round(of["syncs_per_layer"] * layers)
    seconds: Samples = [({"part": p}, of[f"{p}_us_per_layer"] * layers / 1e6) for p in ("sync", "decide", "compute")]
    found: list[tuple[str, str, str, Samples]] = [
        ("passes_total", "counter", "Forward passes.", [({}, of["passes"])]),
        ("layer_steps_total", "counter", "MoE layers served.", [({}, layers)]),
        (
            "needs_total", "counter", "Experts needed, by where they were when their layer was routed.",
            [({"found": where}, round(of[where] * of["needs"])) for where in ("hit", "late", "miss")],
        ),
        ("streamed_total", "counter", "Misses that passed through scratch slots.", [({}, of["streamed"])]),
        ("on_host_total", "counter", "Misses that the host computed.", [({}, of["on_host"])]),
        (
            "copied_bytes_total", "counter", "Bytes copied to the device, by why.",
            [({"kind": kind}, moved[kind]) for kind in ("demand", "stream", "prefetch", "padding")],
        ),
        ("wasted_bytes_total", "counter", "Prefetched bytes that nothing needed.", [({}, moved["wasted"])]),
        ("copies_total", "counter", "Copies submitted.", [({}, moved["copies"])]),
        ("exposed_wait_seconds_total", "counter", "The device waited for experts.", [({}, of["exposed_wait_s"])]),
        ("host_syncs_total", "counter", "The host waited for the device.", [({}, syncs)]),
        ("host_seconds_total", "counter", "The host's time in MoE layers.", seconds),
        ("slots", "gauge", "Expert slots.", [({"kind": kind}, of["slots"][kind]) for kind in ("held", "scratch")]),
        ("slot_bytes", "gauge", "Device memory of all slots.", [({}, of["slots"]["bytes"])]),
    ]  # fmt: skip
    if "disk" in of:
        disk = of["disk"]
        found += [
            ("ram_rows", "gauge", "Experts that host memory holds.", [({}, disk["rows_in_ram"])]),
            ("ram_found_total", "counter", "Experts found in host memory.", [({}, disk["found_in_ram"])]),
            ("disk_reads_total", "counter", "Experts read from disk.", [({}, disk["experts_read"])]),
            ("disk_bytes_total", "counter", "Bytes read from disk.", [({}, disk["bytes_read"])]),
        ]
    return found


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
